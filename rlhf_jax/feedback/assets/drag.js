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
    const [x, y] = [event.clientX - start.x, event.clientY - start.y];
    if (!start.moved && Math.hypot(x, y) < FAR) return;
    if (!start.moved) {
      start.moved = true;
      chip.classList.add("dragged");
      document.body.classList.add("dragging");
    }
    chip.style.transform = `translate(${x}px, ${y}px)`;
    mark(target(event));
  });
  chip.addEventListener("pointerup", (event) => {
    if (!start) return;
    const { moved } = start;
    const found = moved ? target(event) : null;
    end();
    if (found) drop(found.dataset.drop);
    if (moved) chip.dataset.moved = "1";
  });
  chip.addEventListener("pointercancel", end);
  chip.addEventListener("lostpointercapture", () => start && end());
  // A click comes after every press, and from a keyboard or a screen reader alone: a drag is none.
  chip.addEventListener("click", () => {
    if (chip.dataset.moved) delete chip.dataset.moved;
    else tap();
  });
}
