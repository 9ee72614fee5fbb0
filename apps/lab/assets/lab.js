// Which layer is seen, its strength, and one zoom for all viewers: attributes of the root element, read by lab.css.
() => {
  const root = document.documentElement;
  const place = { zoom: 1, x: 0, y: 0 };
  const show = () => {
    root.style.setProperty("--zoom", place.zoom);
    root.style.setProperty("--x", place.x + "%");
    root.style.setProperty("--y", place.y + "%");
    root.classList.toggle("zoomed", place.zoom > 1);
  };
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const move = (x, y) => {
    const least = 100 * (1 - place.zoom);
    place.x = clamp(x, least, 0);
    place.y = clamp(y, least, 0);
    show();
  };
  const zoomAt = (factor, px, py) => {  // px, py: per cent of the stage that stay where they are
    const next = clamp(place.zoom * factor, 1, 12);
    const ratio = next / place.zoom;
    place.zoom = next;
    move(px - (px - place.x) * ratio, py - (py - place.y) * ratio);
  };
  const setView = (view) => {
    root.dataset.view = view;
    document.querySelectorAll("[data-view-button]").forEach((button) =>
      button.setAttribute("aria-pressed", button.dataset.viewButton === view));
  };
  root.dataset.view = "overlay";
  root.style.setProperty("--opacity", 0.45);
  show();
  document.addEventListener("click", (event) => {
    const view = event.target.closest("[data-view-button]");
    if (view) setView(view.dataset.viewButton);
    if (event.target.closest("[data-reset]")) { place.zoom = 1; move(0, 0); }
    const zoom = event.target.closest("[data-zoom]");
    if (zoom) zoomAt(Number(zoom.dataset.zoom), 50, 50);
    const answers = document.querySelector("#toolbar");
    if (event.target.closest("#segment") && answers.getBoundingClientRect().top > innerHeight) answers.scrollIntoView({ behavior: "smooth" });
    const point = event.target.closest("#scatter") && document.querySelector("#scatter .js-plotly-plot")?._hoverdata?.[0];
    if (point?.customdata) location.search = "?record=" + encodeURIComponent(point.customdata);
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches("[data-toggle]")) root.classList.toggle("no-" + event.target.dataset.toggle, !event.target.checked);
  });
  document.addEventListener("input", (event) => {
    if (event.target.matches("[data-opacity]")) root.style.setProperty("--opacity", event.target.value);
  });
  const share = (stage, event) => {
    const box = stage.getBoundingClientRect();
    return [100 * (event.clientX - box.left) / box.width, 100 * (event.clientY - box.top) / box.height];
  };
  document.addEventListener("wheel", (event) => {
    const stage = event.target.closest(".stage");
    if (!stage) return;
    event.preventDefault();
    zoomAt(Math.exp(-event.deltaY / 400), ...share(stage, event));
  }, { passive: false });
  let drag = null;
  document.addEventListener("pointerdown", (event) => {
    const stage = event.target.closest(".stage");
    if (stage) { drag = { stage, at: share(stage, event), x: place.x, y: place.y }; event.preventDefault(); stage.focus(); }
  });
  document.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const now = share(drag.stage, event);
    move(drag.x + now[0] - drag.at[0], drag.y + now[1] - drag.at[1]);
  });
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => { drag = null; });
  document.addEventListener("keydown", (event) => {
    if (!event.target.closest?.(".stage")) return;
    const step = { ArrowLeft: [10, 0], ArrowRight: [-10, 0], ArrowUp: [0, 10], ArrowDown: [0, -10] }[event.key];
    if (step) { event.preventDefault(); move(place.x + step[0], place.y + step[1]); }
    if (event.key === "+" || event.key === "=") zoomAt(1.25, 50, 50);
    if (event.key === "-") zoomAt(0.8, 50, 50);
    if (event.key === "0") { place.zoom = 1; move(0, 0); }
  });
}
