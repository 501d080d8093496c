// Dragging a chip by mouse, pen or touch onto the element with data-drop under it.

const FAR = 6; // pixels after which a press is a drag

export function draggable(chip, { drop, tap }) {
  let start = null;
  let over = null;

  function target(event) {
    for (const element of document.elementsFromPoint(event.clientX, event.clientY)) {
      const found = element.closest("[data-drop]");
      if (found) return found;
    }
    return null;
  }

  function mark(next) {
    if (over !== next) {
      over?.classList.remove("over");
      next?.classList.add("over");
      over = next;
    }
  }

  function end() {
    mark(null);
    chip.classList.remove("dragged");
    chip.style.transform = "";
    document.body.classList.remove("dragging");
    start = null;
  }

  chip.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = { x: event.clientX, y: event.clientY, moved: false };
    chip.setPointerCapture(event.pointerId);
  });
  chip.addEventListener("pointermove", (event) => {
    if (!start) return;
    if (!start.moved && Math.hypot(event.clientX - start.x, event.clientY - start.y) < FAR) return;
    if (!start.moved) {
      const before = chip.getBoundingClientRect();
      chip.classList.add("dragged");
      document.body.classList.add("dragging");
      // Drop targets grow and shift the chip; compensate so that it stays under the pointer.
      const after = chip.getBoundingClientRect();
      start = { x: start.x + after.x - before.x, y: start.y + after.y - before.y, moved: true };
    }
    chip.style.transform = `translate(${event.clientX - start.x}px, ${event.clientY - start.y}px)`;
    mark(target(event));
  });
  chip.addEventListener("pointerup", (event) => {
    if (!start) return;
    const { moved } = start;
    const found = moved ? target(event) : null;
    end();
    if (found) drop(found.dataset.drop);
    else if (!moved) tap();
  });
  chip.addEventListener("pointercancel", end);
  chip.addEventListener("lostpointercapture", () => start && end());
  // A pointer's click is handled on pointerup, since a browser may suppress the click after a fling; clicks with detail 0
  // come from a keyboard or a screen reader.
  chip.addEventListener("click", (event) => event.detail === 0 && tap());
}
