"use strict";
// Sorting, filtering and opening of models. Everything foreign goes in as text, never as markup.
(() => {
  const SHOWN = 250; // rows at once: a browser draws them in a blink
  const FACTS = ["Parameters", "MACs", "Latency", "Latency, weights packed", "Accepted drop", "Task time", "Tries that failed", "In the run before", "Digest", "Reason"];
  const REASON = 9;
  const ASCENDING_FIRST = new Set(["name", "state", "change", "metric"]);
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const table = document.querySelector("table.fleet");
  if (!table) return;

  const body = table.tBodies[0];
  const compared = table.classList.contains("compared");
  const models = Array.from(body.rows, (row, index) => ({
    index,
    row,
    button: row.cells[0].firstElementChild,
    name: row.cells[0].textContent,
    state: row.cells[1].textContent,
    change: compared ? row.cells[2].textContent : "",
    metric: row.cells[compared ? 3 : 2].firstChild.textContent,
    detail: null,
  }));
  const byName = new Map(models.map((model) => [model.name, model]));
  const folded = models.map((model) => model.name.toLowerCase());
  const filters = { state: new Set(), change: new Set() };
  const collator = new Intl.Collator("en", { numeric: true });
  let order = models.slice();
  let limit = SHOWN;

  const element = (tag, attributes, ...children) => {
    const svg = tag === "svg" || tag === "rect";
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  const sortValue = (key) => {
    if (key === "name") return (model) => model.name;
    if (key === "state" || key === "change" || key === "metric") return (model) => (model[key] === "–" ? null : model[key] || null);
    return (model) => data[key][model.index];
  };

  const sortBy = (key, direction) => {
    const value = sortValue(key);
    order.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a.index - b.index; // what is unknown comes last
      const compared = typeof x === "string" ? collator.compare(x, y) : x - y;
      return direction * compared || a.index - b.index;
    });
    for (const head of table.tHead.querySelectorAll("[data-key]")) {
      if (head.dataset.key === key) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
    draw();
  };

  const wanted = () => {
    const text = $("find").value.trim().toLowerCase();
    return order.filter(
      (model) =>
        (!text || folded[model.index].includes(text)) &&
        (!filters.state.size || filters.state.has(model.state)) &&
        (!filters.change.size || filters.change.has(model.change)),
    );
  };

  const draw = () => {
    const found = wanted();
    const rows = [];
    for (const model of found.slice(0, limit)) {
      rows.push(model.row);
      if (model.detail) rows.push(model.detail);
    }
    body.replaceChildren(...rows);
    const all = models.length.toLocaleString("en");
    const narrowed = found.length < models.length;
    $("count").textContent = narrowed ? `${found.length.toLocaleString("en")} of ${all} models` : `${all} ${models.length === 1 ? "model" : "models"}`;
    $("all").hidden = !narrowed;
    const rest = found.length - limit;
    document.querySelector(".moretable").hidden = rest <= 0;
    $("more").textContent = `Show ${Math.min(rest, 4 * SHOWN).toLocaleString("en")} more of ${rest.toLocaleString("en")}`;
  };

  const bar = (kind, text, most, empty) => {
    const cell = element("td", { class: "bar" });
    if (!text && !empty) {
      cell.append("–");
      return cell;
    }
    const value = text ? Math.min(100, (100 * parseFloat(text)) / most) : 100;
    const picture = element("svg", { "aria-hidden": "true" }, element("rect", { class: "back", width: "100%", height: "100%" }));
    picture.append(element("rect", { class: text ? kind : "kept", width: `${value}%`, height: "100%" }));
    cell.append(picture, text || empty);
    return cell;
  };

  const layerTable = (layers) => {
    const worst = Math.max(1e-9, ...layers.map((layer) => parseFloat(layer[9]) || 0));
    const heads = [
      ["Layer"], ["Kind"], ["Bits", "bar: 0 to 16 bits"], ["Sparsity", "share of units or weights removed; bar: 0 to 100 %"],
      ["Error", `root mean square error of the weights, relative to their own; bar: 0 to ${worst.toPrecision(2)} %`],
      ["SQNR, dB", "signal to quantization noise of the weights", "number"], ["Group", "weights that share a scale", "number"],
      ["Bytes", "before and after", "number"], ["Left alone because"],
    ];
    const head = element("tr");
    for (const [label, title, kind] of heads) head.append(element("th", { scope: "col", title: title || "", class: kind || "" }, label));
    const rows = layers.map(([name, kind, removed, sparsity, bits, group, before, after, sqnr, error, skipped]) => {
      const row = element("tr", null, element("th", { scope: "row" }, element("code", null, name)), element("td", null, kind || "–"));
      row.append(bar("bits", bits, 16, "as it was"), bar("sparsity", sparsity, 100), bar("error", error, worst));
      if (removed) row.cells[3].title = `${removed} units removed`;
      const bytes = before || after ? `${before || "–"} → ${after || "–"}` : "–";
      for (const text of [sqnr || "–", group || "–", bytes]) row.append(element("td", { class: "number" }, text));
      row.append(element("td", { class: "why" }, skipped || "–"));
      return row;
    });
    return element("div", { class: "scroll" }, element("table", { class: "layers" }, element("thead", null, head), element("tbody", null, ...rows)));
  };

  const details = (model) => {
    const inside = element("div", { class: "inside" });
    const facts = data.facts[model.index];
    if (facts[REASON]) inside.append(element("p", null, facts[REASON]));
    const list = element("dl");
    FACTS.forEach((label, place) => {
      if (place !== REASON && facts[place]) list.append(element("div", null, element("dt", null, label), element("dd", null, facts[place])));
    });
    if (list.children.length) inside.append(list);
    const layers = data.layers[model.index];
    if (layers) {
      for (const text of layers.warnings) inside.append(element("p", { class: "warning" }, `Warning: ${text}`));
      if (layers.layers.length) inside.append(layerTable(layers.layers));
      if (layers.of > layers.layers.length) inside.append(element("p", { class: "notes" }, `The ${layers.layers.length} largest of ${layers.of} layers; all of them are in its metrics.json.`));
    } else if (facts[8]) {
      inside.append(element("p", { class: "notes" }, "Its layers are in metrics.json beside the artifact; the page keeps those of the largest models."));
    }
    if (!inside.children.length) inside.append(element("p", null, "Nothing more is known of it."));
    return element("tr", { class: "opened" }, element("td", { colspan: String(model.row.cells.length) }, inside));
  };

  const toggle = (model, open = !model.detail) => {
    if (!open === !model.detail) return;
    if (open) {
      model.detail = details(model);
      model.row.after(model.detail);
    } else {
      model.detail.remove();
      model.detail = null;
    }
    model.button.setAttribute("aria-expanded", String(open));
  };

  const showAll = () => {
    $("find").value = "";
    filters.state.clear();
    filters.change.clear();
    for (const chip of document.querySelectorAll("[data-filter]")) chip.setAttribute("aria-pressed", "false");
    limit = SHOWN;
  };

  const goTo = (model) => {
    const place = wanted().indexOf(model);
    if (place < 0) showAll();
    limit = Math.max(limit, order.indexOf(model) + 1);
    toggle(model, true);
    draw();
    model.row.scrollIntoView({ block: "center" });
    model.button.focus({ preventScroll: true });
  };

  // ---- controls
  document.querySelector(".controls").hidden = false;
  for (const model of models) model.button.setAttribute("aria-expanded", "false");
  body.addEventListener("click", (event) => {
    const row = event.target.closest("button") && event.target.closest("tr");
    const model = row && models.find((its) => its.row === row);
    if (model) toggle(model);
  });
  body.addEventListener("keydown", (event) => {
    const detail = event.key === "Escape" && event.target.closest("tr");
    const model = detail && models.find((its) => its.row === detail || its.detail === detail);
    if (model && model.detail) {
      toggle(model, false);
      model.button.focus();
    }
  });
  for (const head of table.tHead.querySelectorAll("[data-key]")) {
    head.firstElementChild.addEventListener("click", () => {
      const key = head.dataset.key;
      const now = head.getAttribute("aria-sort");
      sortBy(key, now ? (now === "ascending" ? -1 : 1) : ASCENDING_FIRST.has(key) ? 1 : -1);
    });
  }
  $("find").addEventListener("input", () => {
    limit = SHOWN;
    draw();
  });
  for (const chip of document.querySelectorAll("[data-filter]")) {
    const { filter, value } = chip.dataset;
    chip.lastElementChild.textContent = models.filter((model) => model[filter] === value).length.toLocaleString("en");
    chip.addEventListener("click", () => {
      const on = chip.getAttribute("aria-pressed") !== "true";
      chip.setAttribute("aria-pressed", String(on));
      if (on) filters[filter].add(value);
      else filters[filter].delete(value);
      limit = SHOWN;
      draw();
    });
  }
  $("all").addEventListener("click", () => {
    showAll();
    draw();
    $("find").focus();
  });
  $("more").addEventListener("click", () => {
    limit += 4 * SHOWN;
    draw();
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.goto");
    const model = link && byName.get(link.textContent);
    if (model) {
      event.preventDefault();
      goTo(model);
    }
  });

  // ---- the drawing of size and accuracy
  const area = $("points");
  const tip = $("tip");
  if (area) {
    const marks = Array.from(area.querySelectorAll("[data-row]"), (mark) => ({
      mark,
      model: models[Number(mark.dataset.row)],
      x: parseFloat(mark.getAttribute("cx") || mark.getAttribute("x")) / 100,
      y: parseFloat(mark.getAttribute("cy") || mark.getAttribute("y")) / 100,
    }));
    let near = null;
    const nearest = (event) => {
      const box = area.getBoundingClientRect();
      let best = null;
      let least = 30 * 30;
      for (const its of marks) {
        const distance = (its.x * box.width - event.clientX + box.left) ** 2 + (its.y * box.height - event.clientY + box.top) ** 2;
        if (distance < least) [best, least] = [its, distance];
      }
      return best;
    };
    const leave = () => {
      if (near) near.mark.classList.remove("over");
      near = null;
      tip.hidden = true;
    };
    area.addEventListener("pointermove", (event) => {
      const found = nearest(event);
      if (found === near) return;
      leave();
      if (!found) return;
      near = found;
      near.mark.classList.add("over");
      const cells = Array.from(near.model.row.cells, (cell) => cell.textContent);
      const at = compared ? 1 : 0;
      tip.textContent = `${near.model.name}\n${cells[2 + at]} ${cells[3 + at]} → ${cells[4 + at]}, ${cells[6 + at]} of the accepted drop\n${cells[7 + at]} → ${cells[8 + at]}, ${cells[9 + at]}`;
      tip.hidden = false;
      const box = near.mark.getBoundingClientRect();
      const left = Math.min(box.right + 10, document.documentElement.clientWidth - tip.offsetWidth - 8);
      tip.style.left = `${window.scrollX + Math.max(8, left)}px`;
      tip.style.top = `${window.scrollY + box.bottom + 8}px`;
    });
    area.addEventListener("pointerleave", leave);
    area.addEventListener("click", (event) => {
      const found = nearest(event);
      leave();
      if (found) goTo(found.model);
    });
  }

  draw();
})();
