// What a report draws by itself: distributions, curves, calibration and volumes (ECharts), the table of cases, and the
// viewer (NiiVue). Names come from files of others: they are set as text, never as markup.
"use strict";
const data = read("data");
const CASE = 0, ORGAN = 1, CONFIGURATION = 2, FOLD = 3, STATUS = 4, CUT = 5, REFERENCE = 6, PREDICTED = 7, EXPECTED = 8, FIRST = 9;
const column = field => FIRST + data.columns.findIndex(c => c.field === field);
const told = (value, digits) => value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
const keyOf = row => `${data.configurations[row[CONFIGURATION]]}|${data.cases[row[CASE]]}`;
const NOTHING = ["both empty", "not computable"];
const unmeasured = row => row[STATUS] === "missed" || row[STATUS] === "invented";

// ---- plots

const charts = [];
// As the style sheet has them in the light.
const PRINTED = ["#0068a8", "#b94e00", "#007a5a", "#9b4f84", "#7d6400", "#3f51b5", "#5f6368", "#111111"];
let paper = false;
const style = () => {
  if (paper) return { ink: "#16212a", soft: "#55636e", rule: "#dbe2e6", card: "#fff", colours: PRINTED };
  const css = getComputedStyle(document.documentElement), of = name => css.getPropertyValue(name).trim();
  return {
    ink: of("--ink"), soft: of("--soft"), rule: of("--rule"), card: of("--card"),
    colours: Array.from({ length: 8 }, (_, n) => of(`--c${n}`)),
  };
};
// In a large page a plot is drawn when it comes near the screen, or on paper.
const waiting = new Map();
const near = new IntersectionObserver(seen => {
  for (const { target } of seen.filter(one => one.isIntersecting)) { near.unobserve(target); waiting.get(target)?.(); waiting.delete(target); }
}, { rootMargin: "400px" });
addEventListener("beforeprint", () => { for (const begin of waiting.values()) begin(); waiting.clear(); });
const paint = (element, option, open) => {
  const plot = { redraw: () => {} };
  if (!document.body.classList.contains("large")) {
    begin(plot, element, option, open);
    return plot;
  }
  waiting.set(element, () => begin(plot, element, option, open));
  near.observe(element);
  return plot;
};
const begin = (plot, element, option, open) => {
  const chart = echarts.init(element, null, { renderer: "canvas", devicePixelRatio: Math.max(2, devicePixelRatio) });
  const redraw = () => {
    const look = style();
    chart.setOption({
      animation: false, textStyle: { color: look.ink, fontFamily: getComputedStyle(document.body).fontFamily, fontSize: 13 },
      tooltip: { confine: true, backgroundColor: look.card, borderColor: look.rule, textStyle: { color: look.ink, fontSize: 13 } },
      ...option(look),
    }, true);
  };
  redraw();
  if (open) chart.on("click", event => event.seriesType === "scatter" && show(data.rows[event.value[2]]));
  plot.redraw = redraw;
  charts.push(plot);
  new ResizeObserver(() => chart.resize()).observe(element);
};
const axis = (look, name, more = {}) => ({
  type: "value", name, nameLocation: "middle", nameGap: 30, scale: true,
  nameTextStyle: { color: look.soft }, axisLabel: { color: look.soft, fontSize: 12 }, axisLine: { lineStyle: { color: look.rule } },
  splitLine: { lineStyle: { color: look.rule } }, ...more,
});
const said = row => `${data.cases[row[CASE]]} · ${data.organs[row[ORGAN]]}` +
  (data.configurations.length > 1 ? ` · ${data.configurations[row[CONFIGURATION]]}` : "");
const safe = text => { const box = make("div", text); return box.innerHTML; };
// The same case lies at the same height in every plot.
const spread = n => ((n * 2654435761) % 4294967296) / 4294967296 - 0.5;

const quantile = (sorted, q) => {
  const at = (sorted.length - 1) * q, low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
};
const box = values => {
  const sorted = [...values].sort((a, b) => a - b), [q1, q3] = [quantile(sorted, .25), quantile(sorted, .75)];
  const inner = sorted.filter(v => v >= q1 - 1.5 * (q3 - q1) && v <= q3 + 1.5 * (q3 - q1));
  return [inner[0], q1, quantile(sorted, .5), q3, inner[inner.length - 1]];
};

const distributions = () => {
  const place = byId("distribution"), which = byId("measure");
  if (!place || !data.drawn.length) return;
  for (const field of data.drawn) {
    const { heading, unit } = data.columns[column(field) - FIRST];
    which.append(make("option", unit ? `${heading} (${unit})` : heading, { value: field }));
  }
  const present = data.configurations.map((_, n) => n).filter(n => data.rows.some(row => row[CONFIGURATION] === n));
  const lines = data.organs.flatMap((_, organ) => present.map(configuration => ({ organ, configuration })));
  const height = () => { place.style.height = `${lines.length * (lines.length > 12 ? 30 : 44) + 80}px`; };
  const option = look => {
    const at = column(which.value), { heading, unit, digits } = data.columns[at - FIRST];
    const length = unit === "mm";
    const found = lines.map(() => []);
    data.rows.forEach((row, n) => {
      if (row[at] === null || (length && unmeasured(row))) return;
      const line = row[ORGAN] * present.length + present.indexOf(row[CONFIGURATION]);
      found[line].push([row[at], line + .62 * spread(row[CASE] + 1), n]);
    });
    const name = line => present.length > 1
      ? `${data.organs[line.organ]} · ${data.configurations[line.configuration]}` : data.organs[line.organ];
    const wide = Math.min(Math.max(...lines.map(line => 7.5 * name(line).length)), place.clientWidth / 3);
    const heights = { min: -.5, max: lines.length - .5 };
    const colour = line => look.colours[line.configuration % 8];
    return {
      grid: { left: wide + 16, right: 24, top: 12, bottom: 48 },
      xAxis: axis(look, unit ? `${heading} (${unit})` : heading, unit ? {} : { max: 1 }),
      yAxis: [
        { type: "category", inverse: true, data: lines.map(name), axisTick: { show: false },
          axisLabel: { color: look.ink, fontSize: 12, width: wide, overflow: "truncate", interval: 0 },
          axisLine: { lineStyle: { color: look.rule } } },
        { type: "value", inverse: true, show: false, ...heights },
      ],
      tooltip: {
        confine: true, backgroundColor: look.card, borderColor: look.rule, textStyle: { color: look.ink },
        formatter: one => one.seriesType !== "scatter" ? safe(`${one.name}: median ${told(one.value[3], digits)}`)
          : safe(`${said(data.rows[one.value[2]])}: ${told(one.value[0], digits)} ${unit}`),
      },
      series: [
        { type: "boxplot", z: 1, boxWidth: ["50%", "80%"],
          data: found.map((points, n) => points.length ? { value: box(points.map(p => p[0])),
            itemStyle: { color: "transparent", borderColor: colour(lines[n]), borderWidth: 1.5 } } : { value: [] }) },
        ...present.map((configuration, n) => ({
          type: "scatter", yAxisIndex: 1, z: 2, symbolSize: data.rows.length > 4000 ? 5 : 8, progressive: 4000,
          itemStyle: { opacity: .6, color: look.colours[configuration % 8] },
          data: found.flatMap((points, line) => line % present.length === n ? points : []),
        })),
      ],
    };
  };
  height();
  const mine = paint(place, option, true);
  const count = () => {
    const length = data.columns[column(which.value) - FIRST].unit === "mm", missing = data.rows.filter(unmeasured);
    byId("unmeasured").textContent = length && missing.length
      ? `${missing.length} missed or invented structures have no surface to measure to, and are not drawn.` : "";
  };
  which.addEventListener("change", () => { mine.redraw(); count(); });
  count();
};

const DASHES = ["solid", "dashed", "dotted", [12, 4, 3, 4]];
const curves = () => {
  for (const [id, what, name] of [["loss", "loss", "Training loss"], ["learnt", "dice", "Validation Dice"]]) {
    const place = byId(id), lines = data.curves.filter(c => c[what].length);
    if (!place || !lines.length) { place?.closest("figure").remove(); continue; }
    paint(place, look => ({
      grid: { left: 8, right: 20, top: 12, bottom: 46, containLabel: true },
      xAxis: axis(look, "minutes", { min: 0 }), yAxis: axis(look, "", {}),
      tooltip: { confine: true, trigger: "item", backgroundColor: look.card, borderColor: look.rule,
        textStyle: { color: look.ink }, formatter: p => safe(`${p.seriesName}: ${told(p.value[1], 3)} after ${told(p.value[0], 1)} min`) },
      series: lines.flatMap(c => c[what].map(points => ({
        type: "line", name: `${c.configuration}, fold ${c.fold}`, data: points, symbol: "circle",
        symbolSize: what === "dice" ? 6 : 3, lineStyle: { width: 2, type: DASHES[c.fold % 4] },
        color: look.colours[data.configurations.indexOf(c.configuration) % 8],
      }))),
    }));
    place.setAttribute("aria-label", `${name} against minutes. ` + lines.map(c =>
      `${c.configuration} fold ${c.fold} ends at ${told(c[what].at(-1).at(-1)[1], 3)}.`).join(" "));
  }
};

const diagonal = look => ({
  type: "line", silent: true, symbol: "none", data: [[0, 0], [1, 1]], lineStyle: { color: look.soft, type: "dashed", width: 1 },
});
const calibration = () => {
  const place = byId("expected"), dice = column("dice");
  const both = data.rows.filter(row => row[EXPECTED] !== null && row[dice] !== null).flatMap(row => [row[EXPECTED], row[dice]]);
  const least = Math.floor(10 * both.reduce((a, b) => Math.min(a, b), 0.9)) / 10;
  if (place) paint(place, look => ({
    grid: { left: 62, right: 20, top: 12, bottom: 46 },
    xAxis: axis(look, "predicted Dice", { min: least, max: 1 }), yAxis: axis(look, "Dice", { min: least, max: 1, nameGap: 40 }),
    tooltip: { confine: true, backgroundColor: look.card, borderColor: look.rule, textStyle: { color: look.ink },
      formatter: p => p.value.length < 3 ? "" : safe(`${said(data.rows[p.value[2]])}: ${told(p.value[1], 3)}, predicted ${told(p.value[0], 3)}`) },
    series: [diagonal(look), ...data.configurations.map((_, configuration) => ({
      type: "scatter", symbolSize: 7, progressive: 4000, itemStyle: { opacity: .65, color: look.colours[configuration % 8] },
      data: data.rows.flatMap((row, n) => row[CONFIGURATION] !== configuration || row[EXPECTED] === null || row[dice] === null
        ? [] : [[row[EXPECTED], row[dice], n]]) }))],
  }), true);
  const bins = byId("reliability");
  if (bins) paint(bins, look => ({
    grid: { left: 62, right: 20, top: 30, bottom: 46 }, legend: { type: "scroll", top: 0, textStyle: { color: look.soft } },
    xAxis: axis(look, "probability", { min: 0, max: 1 }), yAxis: axis(look, "share that is right", { min: 0, max: 1, nameGap: 36 }),
    tooltip: { confine: true, backgroundColor: look.card, borderColor: look.rule, textStyle: { color: look.ink },
      formatter: p => safe(`${p.seriesName}: of voxels given ${told(p.value[0], 2)}, ${told(p.value[1], 2)} are right`) },
    series: [diagonal(look), ...data.reliable.map((one, n) => ({
      type: "line", color: look.colours[n % 8], symbolSize: 6,
      name: `${one.name} · ${one.configuration}, fold ${one.fold} (ECE ${told(one.ece, 3)})`,
      data: one.probability.flatMap((p, i) => p === null ? [] : [[p, one.right[i]]]),
    }))],
  }));
};

const volumes = () => {
  const place = byId("volumes"), which = byId("organ");
  if (!place || !data.agreement.length) return;
  data.agreement.forEach((one, n) => which.append(make("option", data.configurations.length > 1
    ? `${one.name} · ${one.configuration}` : one.name, { value: n })));
  const mine = paint(place, look => {
    const one = data.agreement[which.value], organ = data.organs.indexOf(one.name);
    const configuration = data.configurations.indexOf(one.configuration);
    const room = 0.1 * (one.high - one.low || 1);
    const line = (value, text) => ({ yAxis: value, label: { formatter: text, color: look.soft, position: "insideEndTop" } });
    return {
      grid: { left: 76, right: 24, top: 16, bottom: 46 },
      xAxis: axis(look, "mean of reference and prediction (ml)"), yAxis: axis(look, "predicted less reference (ml)", {
        nameGap: 54, min: r => Math.min(r.min, one.low) - room, max: r => Math.max(r.max, one.high) + room,
        axisLabel: { color: look.soft, formatter: v => Number(v.toPrecision(3)).toString() } }),
      tooltip: { confine: true, backgroundColor: look.card, borderColor: look.rule, textStyle: { color: look.ink }, formatter: p =>
        p.value.length < 3 ? "" : safe(`${said(data.rows[p.value[2]])}: ${told(data.rows[p.value[2]][PREDICTED], 2)} ml, reference ${told(data.rows[p.value[2]][REFERENCE], 2)} ml`) },
      series: [{ type: "scatter", symbolSize: 8, itemStyle: { opacity: .65, color: look.colours[configuration % 8] },
        markLine: { silent: true, symbol: "none", lineStyle: { color: look.soft, type: "dashed" }, data: [
          line(one.bias, `mean ${told(one.bias, 2)} ml`), line(one.low, `95 % from ${told(one.low, 2)}`), line(one.high, `to ${told(one.high, 2)} ml`)] },
        data: data.rows.flatMap((row, n) => row[ORGAN] !== organ || row[CONFIGURATION] !== configuration || NOTHING.includes(row[STATUS])
          ? [] : [[(row[REFERENCE] + row[PREDICTED]) / 2, row[PREDICTED] - row[REFERENCE], n]]) }],
    };
  }, true);
  which.addEventListener("change", () => mine.redraw());
};

// ---- tables

const AT_ONCE = 150;
const cases = () => {
  const table = byId("all-cases");
  if (!table) return;
  const columns = [
    { heading: "Case", text: true, of: row => data.cases[row[CASE]] },
    { heading: "Organ", text: true, of: row => data.organs[row[ORGAN]] },
    { heading: "Configuration", text: true, of: row => data.configurations[row[CONFIGURATION]] },
    { heading: "Fold", of: row => row[FOLD], digits: 0 },
    { heading: "Status", text: true, of: row => row[STATUS] + (row[CUT] ? ", cut" : "") },
    ...data.columns.map((c, n) => ({ heading: c.heading, unit: c.unit, digits: c.digits, of: row => row[FIRST + n] })),
    { heading: "Reference", unit: "ml", digits: 2, of: row => row[REFERENCE] },
    { heading: "Predicted", unit: "ml", digits: 2, of: row => row[PREDICTED] },
  ].filter(c => c.text || data.rows.some(row => c.of(row) !== null));
  const head = table.tHead.rows[0];
  for (const c of columns) {
    const cell = make("th", null, { scope: "col", ...(c.text ? { class: "text" } : {}) });
    cell.append(make("span", c.heading));
    if (c.unit) cell.append(make("small", c.unit));
    head.append(cell);
  }
  // Rows are known by their place, which plots hold too: it is a copy that is put in order.
  const order = [...data.rows];
  let found = order, shown = 0;
  const body = table.tBodies[0];
  const cell = (row, c, n) => {
    const value = c.of(row), td = make(n ? "td" : "th", null, n ? {} : { scope: "row" });
    if (c.text) td.classList.add("text");
    if (!n) {
      const button = make("button", value, { type: "button", class: "open", title: scans[keyOf(row)] ? "Open the scan" : "Open" });
      if (scans[keyOf(row)]) button.append(make("i", "◧", { "aria-label": "with its scan" }));
      button.addEventListener("click", () => show(row));
      td.append(button);
    } else td.textContent = c.text ? value : told(value, c.digits);
    if (c.heading === "Status" && unmeasured(row)) td.classList.add("bad");
    return td;
  };
  const more = () => {
    const part = document.createDocumentFragment();
    for (const row of found.slice(shown, shown + AT_ONCE)) {
      const tr = make("tr");
      columns.forEach((c, n) => tr.append(cell(row, c, n)));
      part.append(tr);
    }
    body.append(part);
    shown = Math.min(shown + AT_ONCE, found.length);
    byId("shown").textContent = `${found.length} of ${data.rows.length} rows${shown < found.length ? `, ${shown} drawn so far` : ""}`;
    byId("more").hidden = shown >= found.length;
  };
  const again = () => { body.replaceChildren(); shown = 0; more(); };
  const fields = { text: byId("find"), status: byId("status"), configuration: byId("configuration") };
  for (const [name, at] of [["status", row => row[STATUS]], ["configuration", row => data.configurations[row[CONFIGURATION]]]]) {
    const values = [...new Set(data.rows.map(at))];
    for (const value of values) fields[name].append(make("option", value, { value }));
    if (values.length < 2) fields[name].closest("label").hidden = true;
  }
  if (Object.keys(data.flagged).length) fields.status.append(make("option", "flagged for review", { value: "flagged" }));
  fields.status.closest("label").hidden = fields.status.options.length < 3;
  const narrow = () => {
    const wanted = fields.text.value.trim().toLowerCase();
    found = order.filter(row =>
      (!wanted || `${data.cases[row[CASE]]} ${data.organs[row[ORGAN]]}`.toLowerCase().includes(wanted)) &&
      (!fields.status.value || row[STATUS] === fields.status.value || (fields.status.value === "flagged" && data.flagged[keyOf(row)])) &&
      (!fields.configuration.value || data.configurations[row[CONFIGURATION]] === fields.configuration.value));
    again();
  };
  for (const field of Object.values(fields)) field.addEventListener("input", narrow);
  sortable(table, (at, down) => {
    const { of } = columns[at];
    order.sort((a, b) => ordered(of(a), of(b), down));
    narrow();
  });
  byId("more").addEventListener("click", more);
  new IntersectionObserver(seen => seen[0].isIntersecting && shown < found.length && more()).observe(byId("more"));
  again();
};

// ---- a case, opened

const show = row => {
  const dialog = byId("viewer"), key = keyOf(row), facts = byId("facts");
  byId("viewer-title").textContent = `${data.cases[row[CASE]]} · ${data.configurations[row[CONFIGURATION]]}`;
  facts.replaceChildren();
  const fields = ["dice", "nsd", "hd95_mm"].map(column);
  for (const other of data.rows.filter(r => keyOf(r) === key)) {
    const tr = make("tr");
    tr.append(make("th", data.organs[other[ORGAN]], { scope: "row" }), make("td", other[STATUS] + (other[CUT] ? ", cut" : ""), { class: unmeasured(other) ? "bad text" : "text" }));
    for (const at of fields) tr.append(make("td", told(other[at], data.columns[at - FIRST].digits)));
    tr.append(make("td", told(other[REFERENCE], 2)), make("td", told(other[PREDICTED], 2)));
    if (other === row) tr.classList.add("this");
    facts.append(tr);
  }
  byId("why").textContent = (data.flagged[key] || []).join(" ");
  if (!dialog.open) dialog.showModal();
  draw(key);
};
for (const button of document.querySelectorAll("button[data-open]")) {
  const at = data.rows.findIndex(row => keyOf(row) === button.dataset.open);
  if (at >= 0) button.addEventListener("click", () => show(data.rows[at])); else button.replaceWith(button.closest("figcaption") ? "" : button.textContent);
}

// ---- begin

if (window.echarts) { distributions(); curves(); calibration(); volumes(); }
cases();
const recolour = () => charts.forEach(c => c.redraw());
addEventListener("beforeprint", () => { paper = true; recolour(); });
addEventListener("afterprint", () => { paper = false; recolour(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
