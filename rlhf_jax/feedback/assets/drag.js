// Dragging a chip by mouse, pen or finger to whatever lies under it and carries data-drop.

const FAR = 6; // pixels before a press is a drag

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
      // The places to drop on grow and push the chip aside; it stays under the finger.
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
  // A pointer's click was a press already, and a browser may keep it back after a fling; others come from a keyboard or
  // a screen reader.
  chip.addEventListener("click", (event) => event.detail === 0 && tap());
}
