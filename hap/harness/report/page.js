"use strict";
// the filters of the table of claims
(() => {
  const form = document.getElementById("filters");
  const [outcome, spec, text] = ["outcome", "spec", "text"].map((name) => document.getElementById("filter-" + name));
  const rows = [...document.querySelectorAll("#claims tbody tr")];
  const words = rows.map((row) => (row.textContent + " " + row.dataset.text).toLowerCase());
  const show = () => {
    const wanted = text.value.toLowerCase().split(/\s+/);
    let count = 0;
    rows.forEach((row, at) => {
      const fits =
        (!outcome.value || row.dataset.outcome === outcome.value) &&
        (!spec.value || row.dataset.spec === spec.value) &&
        wanted.every((word) => words[at].includes(word));
      row.hidden = !fits;
      count += fits;
    });
    document.getElementById("shown").textContent = `${count} of ${rows.length} claims`;
  };
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("reset", () => setTimeout(show));
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
})();

// a link to something within a closed part opens it; a print has all that there is
(() => {
  const closed = () => [...document.querySelectorAll("details:not([open])")];
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = closed();
    opened.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));
})();

// the plots: both of a spec share its data and its controls
(() => {
  if (typeof vegaEmbed === "undefined") return;
  const options = { actions: false, renderer: "svg", loader: { target: "_blank" } };
  const waiting = [...document.querySelectorAll("script.plot-data")].map(async (script) => {
    const { datasets, charts } = JSON.parse(script.textContent);
    const name = script.dataset.spec;
    const places = [...document.querySelectorAll(".plot")].filter((place) => place.dataset.spec === name);
    const views = await Promise.all(
      places.map(async (place) => (await vegaEmbed(place, { ...charts[place.dataset.size], datasets }, options)).view),
    );
    const controls = [...document.querySelectorAll("form.controls")].find((form) => form.dataset.plots === name);
    controls.hidden = false;
    controls.addEventListener("submit", (event) => event.preventDefault());
    controls.addEventListener("input", (event) => {
      views.forEach((view) => view.signal(event.target.dataset.signal, event.target.value).runAsync());
    });
  });
  Promise.all(waiting).then(() => { document.documentElement.dataset.plots = "drawn"; });
})();
