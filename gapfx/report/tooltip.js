// Reading values off a chart: a line, a dot and a text at the nearest logged point.
for (const frame of document.querySelectorAll("[data-tips]")) {
  const tips = JSON.parse(frame.dataset.tips);
  const top = +frame.dataset.top, height = +frame.dataset.height;
  const [line, dot, text] = ["tip-line", "tip-dot", "tip"].map((name) => {
    const part = frame.appendChild(document.createElement("div"));
    part.className = name;
    part.hidden = true;
    return part;
  });
  const svg = frame.querySelector("svg");
  const hide = () => { line.hidden = dot.hidden = text.hidden = true; };
  frame.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), outer = frame.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    if (share < -0.02 || share > 1.02) return hide();
    const [x, y, words] = tips.reduce((a, b) => (Math.abs(b[0] - share) < Math.abs(a[0] - share) ? b : a));
    const left = box.left - outer.left + x * box.width, down = top + Math.min(1, Math.max(0, y)) * height;
    line.hidden = dot.hidden = text.hidden = false;
    text.textContent = words;
    Object.assign(line.style, { left: `${left}px`, top: `${top}px`, height: `${height}px` });
    Object.assign(dot.style, { left: `${left}px`, top: `${down}px` });
    const room = Math.min(Math.max(left - text.offsetWidth / 2, 0), outer.width - text.offsetWidth);
    Object.assign(text.style, { left: `${room}px`, top: `${Math.max(0, down - 40)}px` });
  });
  frame.addEventListener("pointerleave", hide);
}
