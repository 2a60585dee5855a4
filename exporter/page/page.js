"use strict";
// Draws what /api/live and /api/history say. Every text from the agent goes in as text, never as HTML.

const LIVE_MS = 2000;
const HISTORY_MS = 4000;
const PATIENCE_MS = 10000;
const EVENTS = 10;
const CAUSES = ["on_cpu", "run_queue", "cpu_quota", "lock", "disk", "memory", "network", "upstream", "gpu", "sleep", "stopped", "unexplained"];
const $ = (id) => document.getElementById(id);

let chosen = fromAddress();
let latest = null;
let history_ = null;
const charts = {};

// The model that the address names; none where it is no such name.
function fromAddress() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
}

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (name === "style") Object.assign(node.style, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const known = (value) => value !== null && value !== undefined;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function time(seconds) {
  if (!known(seconds)) return "–";
  if (seconds === 0) return "0";
  const [value, unit] = seconds < 1e-3 ? [seconds * 1e6, "µs"] : seconds < 1 ? [seconds * 1e3, "ms"] : [seconds, "s"];
  return `${value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)} ${unit}`;
}
function number(value, digits = 1) {
  if (!known(value)) return "–";
  if (value === 0) return "0";
  return value >= 1e6 ? `${(value / 1e6).toFixed(1)}M` : value >= 1e4 ? `${(value / 1e3).toFixed(1)}k` : value.toFixed(value >= 100 ? 0 : digits);
}
const percent = (ratio, digits = 1) => (known(ratio) ? `${(100 * ratio).toFixed(digits)} %` : "–");
function bytes(value) {
  if (!known(value)) return "–";
  const unit = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  for (; value >= 1024 && power < 4; power++) value /= 1024;
  return `${value.toFixed(power && value < 100 ? 1 : 0)} ${unit[power]}`;
}
const clock = (seconds, digits = 5) => new Date(seconds * 1000).toTimeString().slice(0, digits);
const modelOf = (row) => row.model ?? "_unknown";
const keyOf = (row) => `${row.service}/${modelOf(row)}/${row.api}`;
const grade = (value, warn, bad) => (!known(value) ? "" : value > bad ? "bad" : value > warn ? "warn" : "");

// ---- the table of models ----

const COLUMNS = [
  ["in flight", (row) => number(row.in_flight, 0)],
  ["requests/s", (row) => number(row.requests_per_second)],
  ["TTFT p50", (row) => time(row.ttft_p50_seconds)],
  ["TTFT p99", (row) => time(row.ttft_p99_seconds), (row) => grade(row.ttft_p99_seconds, 0.3, 1)],
  ["ITL p50", (row) => time(row.itl_p50_seconds)],
  ["ITL p99", (row) => time(row.itl_p99_seconds), (row) => grade(row.itl_p99_seconds, 0.1, 0.3)],
  ["tokens/s", (row) => number(row.tokens_per_second)],
  ["cache hit", (row) => percent(row.cache_hit_ratio)],
  ["failed", (row) => number(row.failures, 0), (row) => (row.failures ? "bad" : "")],
  ["left", (row) => number(row.aborts, 0)],
  ["seen", (row) => percent(row.coverage), (row) => (known(row.coverage) ? grade(1 - row.coverage, 0.005, 0.05) : "")],
  ["mostly", (row) => (row.why ? `${row.why.cause} ${percent(row.why.share, 0)}` : "–")],
];

function choose(key) {
  chosen = key === chosen ? "" : key;
  window.history.replaceState(null, "", chosen ? `#${encodeURIComponent(chosen)}` : location.pathname);
  draw();
}

function drawModels() {
  const rows = latest.models;
  const several = new Set(rows.map((row) => row.service)).size > 1;
  $("no-models").hidden = rows.length > 0;
  $("no-models").textContent = latest.targets.some((target) => target.processes)
    ? "No request to a model yet. They are shown when the first one is answered."
    : `No process to watch yet: ${latest.targets.map((target) => target.service).join(", ")}.`;
  $("models").parentElement.hidden = rows.length === 0;
  const head = make("thead", {}, make("tr", {}, make("th", { text: "model", scope: "col" }), ...COLUMNS.map(([title]) => make("th", { text: title, scope: "col" }))));
  const body = make("tbody", {}, ...rows.map((row) => {
    const key = keyOf(row);
    const name = several ? `${row.service} / ${modelOf(row)}` : modelOf(row);
    const first = make("td", { "data-title": "model" }, make("span", {}, make("button", { text: name, "data-key": key }), make("span", { class: "dim", text: ` ${row.api}` })));
    const cells = COLUMNS.map(([title, text, level]) => make("td", { text: text(row), "data-title": title, class: level ? level(row) : null }));
    return make("tr", { "aria-selected": String(key === chosen), onclick: () => choose(key) }, first, ...cells);
  }));
  const focused = document.activeElement?.dataset?.key;
  $("models").replaceChildren(head, body);
  if (focused) [...document.querySelectorAll("#models button")].find((button) => button.dataset.key === focused)?.focus();
}

// ---- the half hour ----

const inView = () => history_.models.filter((model) => !chosen || keyOf(model) === chosen);
const sums = (models, column) => history_.times.map((_, at) => models.reduce((sum, model) => (known(model[column][at]) ? (sum ?? 0) + model[column][at] : sum), null));
// Quantiles of several models cannot be added: the slowest of them is shown.
const worst = (models, column) => history_.times.map((_, at) => models.reduce((most, model) => (known(model[column][at]) ? Math.max(most ?? 0, model[column][at]) : most), null));
const perSecond = (values) => values.map((value) => (known(value) ? value / history_.step_seconds : null));

function lines(id, series, data, label) {
  const key = [colour("first"), ...series.map((each) => each.label)].join();
  const place = $(id);
  const width = place.clientWidth, height = 200;
  if (charts[id]?.key !== key) {
    charts[id]?.plot.destroy();
    const axis = { stroke: colour("dim"), grid: { stroke: colour("grid"), width: 1 }, ticks: { stroke: colour("grid"), width: 1 }, font: "12px system-ui" };
    const sides = [...new Set(series.map((each) => each.scale ?? "y"))];
    const range = (_, low, high) => [0, high > 0 ? high * 1.08 : 1];
    const upright = (scale, at) => ({ ...axis, scale, side: at ? 1 : 3, size: at ? 50 : 62, grid: at ? { show: false } : axis.grid,
      stroke: sides.length > 1 ? series[at].stroke : axis.stroke, values: (_, ticks) => ticks.map(label) });
    const plot = new uPlot({
      width, height,
      padding: [8, 8, 0, 0],
      cursor: { y: false },
      scales: { x: { time: true }, ...Object.fromEntries(sides.map((scale) => [scale, { range }])) },
      axes: [{ ...axis, space: 70, values: (_, ticks) => ticks.map((tick) => clock(tick)) }, ...sides.map(upright)],
      series: [{ label: "at", value: (_, at) => (known(at) ? clock(at, 8) : "–") }, ...series.map((each) => ({ ...each, width: 1.75, points: { size: 4 }, value: (_, value) => label(value) }))],
    }, data, place);
    charts[id] = { key, plot };
    return;
  }
  const { plot } = charts[id];
  if (plot.width !== width) plot.setSize({ width, height });
  plot.setData(data);
}

function drawHistory() {
  const models = inView();
  const several = history_.models.length > 1;
  for (const node of document.querySelectorAll(".chosen")) {
    const latency = node.classList.contains("latency");
    node.textContent = chosen || (!several ? "" : latency ? "the slowest of all models" : "all models together");
  }
  const pair = [{ label: "p50", stroke: colour("first") }, { label: "p99", stroke: colour("second") }];
  lines("ttft", pair, [history_.times, worst(models, "ttft_p50"), worst(models, "ttft_p99")], time);
  lines("itl", pair, [history_.times, worst(models, "itl_p50"), worst(models, "itl_p99")], time);
  lines("load", [{ label: "requests/s", stroke: colour("first") }, { label: "frames/s", stroke: colour("second"), scale: "frames" }],
    [history_.times, perSecond(sums(models, "requests")), perSecond(sums(models, "frames"))], (value) => number(value));
  drawHeat(models);
}

function drawHeat(models) {
  const canvas = $("heat");
  const scale = window.devicePixelRatio || 1;
  const [width, height, left, bottom] = [canvas.clientWidth, 200, 62, 22];
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.clearRect(0, 0, width, height);
  const bounds = history_.heat_bounds;
  const cells = history_.times.map((_, at) => {
    const column = new Array(bounds.length + 1).fill(0);
    for (const model of models) model.heat[at].forEach((count, row) => { column[row] += count; });
    return column;
  });
  const used = bounds.map((_, row) => row).concat(bounds.length).filter((row) => cells.some((column) => column[row]));
  const all = cells.reduce((sum, column) => sum + column.reduce((a, b) => a + b, 0), 0);
  $("heat-says").textContent = all ? `${all} first tokens in the last ${Math.round(history_.times.length * history_.step_seconds / 60)} minutes; the stronger the colour, the more` : "no first token in the last half hour";
  if (!all) return;
  const [low, high] = [Math.max(0, used[0] - 1), Math.min(bounds.length, used[used.length - 1] + 1)];
  const [cellWidth, cellHeight] = [(width - left) / cells.length, (height - bottom - 4) / (high - low + 1)];
  const most = Math.max(...cells.flat());
  cells.forEach((column, at) => column.forEach((count, row) => {
    if (!count || row < low || row > high) return;
    pen.fillStyle = `rgba(${colour("heat")}, ${0.15 + 0.85 * Math.log1p(count) / Math.log1p(most)})`;
    pen.fillRect(left + at * cellWidth, 4 + (high - row) * cellHeight, Math.max(1, cellWidth - 0.5), Math.max(1, cellHeight - 0.5));
  }));
  pen.fillStyle = colour("dim");
  pen.font = "12px system-ui";
  pen.textAlign = "right";
  const every = Math.max(1, Math.ceil((high - low + 1) / 8));
  for (let row = low; row < high; row += every) pen.fillText(time(bounds[row]), left - 6, 8 + (high - row) * cellHeight);
  pen.textAlign = "center";
  const steps = Math.max(Math.ceil(60 / history_.step_seconds), Math.round(cells.length / Math.max(2, Math.floor((width - left) / 90))));
  for (let at = steps; at < cells.length - steps / 3; at += steps) {
    pen.fillText(clock(history_.times[at]), left + at * cellWidth, height - 6);
  }
}

// ---- causes ----

function bar(parts) {
  const whole = parts.reduce((sum, [, seconds]) => sum + seconds, 0);
  return make("div", { class: "bar", role: "img", "aria-label": parts.map(([cause, seconds]) => `${cause} ${percent(seconds / whole, 0)}`).join(", ") },
    ...parts.map(([cause, seconds]) => make("i", { title: `${cause}: ${time(seconds)}, ${percent(seconds / whole)}`, style: { width: `${100 * seconds / whole}%`, background: `var(--${cause})` } })));
}
const ordered = (causes) => CAUSES.filter((cause) => causes?.[cause] > 0).map((cause) => [cause, causes[cause]]);

function drawCauses() {
  const rows = latest.models.filter((row) => (!chosen || keyOf(row) === chosen) && ordered(row.causes).length);
  $("causes").replaceChildren(...(rows.length ? rows.map((row) => make("div", { class: "cause-row" },
    make("span", { text: modelOf(row) }), bar(ordered(row.causes)), make("span", { text: row.why ? percent(row.why.share, 0) : "", class: "dim", title: row.why?.cause ?? "" })))
    : [make("p", { class: "dim", text: latest.explains ? "No request with a path yet." : "The scheduler probe is not up: causes are not known." })]));
  const shown = CAUSES.filter((cause) => rows.some((row) => row.causes[cause] > 0));
  $("legend").replaceChildren(...shown.map((cause) => make("li", {}, make("i", { style: { background: `var(--${cause})` } }), cause)));
}

// ---- slow requests ----

async function openPath(request, place) {
  place.replaceChildren(make("p", { class: "dim", text: "Asking for its path." }));
  try {
    const answer = await fetch(`api/why?number=${request.number}`, asking());
    const line = (await answer.text()).split("\n")[0];
    const steps = answer.ok && line ? JSON.parse(line).steps : [];
    place.replaceChildren(steps.length ? make("table", { class: "steps" },
      make("thead", {}, make("tr", {}, ...["after", "for", "thread", "cause", "what", "woken by"].map((text) => make("th", { text, class: "left" })))),
      make("tbody", {}, ...steps.map((step) => make("tr", {},
        make("td", { text: time(step.offset_seconds) }), make("td", { text: time(step.duration_seconds) }),
        make("td", { text: step.thread ?? (step.tid ? `thread ${step.tid}` : "–") }),
        make("td", {}, make("i", { class: "swatch", style: { background: `var(--${step.cause})` } }), step.cause),
        make("td", { text: step.detail ?? "" }), make("td", { text: step.woken_by_thread ?? step.woken_by ?? "" })))))
      : make("p", { class: "dim", text: "Its path is no longer kept." }));
  } catch (error) {
    place.replaceChildren(make("p", { class: "bad", text: `No path: ${error.message}` }));
  }
}

function drawSlow() {
  const requests = latest.slow;
  if (!requests.length) {
    $("slow").replaceChildren(make("p", { class: "dim", text: latest.explains ? "None with a path in the last minutes." : "The scheduler probe is not up: no request has a path." }));
    return;
  }
  const there = new Map([...$("slow").querySelectorAll("details")].map((node) => [Number(node.dataset.number), node]));
  $("slow").replaceChildren(...requests.map((request) => {
    const old = there.get(request.number);
    if (old) return old;
    const path = make("div", { class: "scroll" });
    const parts = ordered(request.causes.ttft);
    const main = parts.reduce((most, part) => (part[1] > most[1] ? part : most), ["", 0])[0];
    const node = make("details", { "data-number": request.number, ontoggle: () => node.open && openPath(request, path) },
      make("summary", {}, make("span", { class: "dim", text: new Date(request.time).toTimeString().slice(0, 8) }), make("span", { text: modelOf(request) }),
        make("b", { text: time(request.time_to_first_token_seconds) }), bar(parts), make("span", { class: "dim", text: `mostly ${main}` })), path);
    return node;
  }));
}

// ---- objectives, health, GPUs, engines, the agent ----

// A target with the digits that were written, and what was met of it with as many, two at least, and never rounded up:
// what is below the target must not read as it, and 99.999 % not as 100 %. Of whole numbers, so that 57 of 100 are 57 %.
function target(ratio) {
  return `${Number((100 * ratio).toPrecision(10))}`;
}
function met(row) {
  if (!row.total) return "–";
  const digits = Math.max(2, target(row.target).split(".")[1]?.length ?? 0);
  return `${(Math.floor(row.good * 10 ** (digits + 2) / row.total) / 10 ** digits).toFixed(digits)} %`;
}

function drawObjectives() {
  const rows = latest.objectives;
  $("objectives-section").hidden = !rows.length;
  const titles = ["objective", "service", "model", "target", "good", "all", "met", "burn rate 5m", "1h", "budget left"];
  $("objectives").replaceChildren(
    make("thead", {}, make("tr", {}, ...titles.map((text) => make("th", { text, scope: "col" })))),
    make("tbody", {}, ...rows.map((row) => make("tr", {},
      make("td", { text: row.name }), make("td", { text: row.service }), make("td", { text: row.model }), make("td", { text: `${target(row.target)} %` }),
      make("td", { text: number(row.good, 0) }), make("td", { text: number(row.total, 0) }),
      make("td", { text: met(row), class: known(row.ratio) && row.ratio < row.target ? "bad" : null }),
      make("td", { text: known(row.burn_rate_5m) ? number(row.burn_rate_5m, 2) : "–", class: grade(row.burn_rate_5m, 1, 14.4) }),
      make("td", { text: known(row.burn_rate_1h) ? number(row.burn_rate_1h, 2) : "–", class: grade(row.burn_rate_1h, 1, 14.4) }),
      make("td", { text: percent(row.budget_remaining), class: known(row.budget_remaining) && row.budget_remaining < 0 ? "bad" : null })))));
}

const AMOUNT = { bytes, seconds: time, ratio: percent, files: (value) => number(value, 0), cpus: (value) => number(value, 2) };
const HAPPENED = { began: "not normal", ended: "normal again", new_normal: "taken for normal now", descriptor_leak: "leaks descriptors" };
const words = (name) => name.replaceAll("_", " ");
const amount = (value, unit) => (AMOUNT[unit] ?? number)(value);

function drawHealth() {
  const { services, events, sigmas } = latest.health ?? { services: [], events: [] };
  $("health-section").hidden = !services.length;
  const signals = services.flatMap((service) => service.signals);
  const bad = signals.filter((signal) => signal.anomalous).length;
  $("health-says").textContent = bad ? `${bad} not normal: ${sigmas} deviations or more above the median of the last five minutes`
    : signals.some((signal) => known(signal.normal)) ? "as usual, compared with the last five minutes" : "what is normal is being learnt; it takes two and a half minutes";
  $("health-says").className = bad ? "bad" : "dim";
  $("health").replaceChildren(...services.map(({ service, signals }) => tile(service, signals.map(({ signal, unit, value, normal, anomalous }) => [
    words(signal), known(value) ? amount(value, unit) : null, anomalous ? "bad" : null, known(normal) ? `usually ${amount(normal, unit)}` : null]))));
  $("events-card").hidden = !events.length;
  $("events").replaceChildren(
    make("thead", {}, make("tr", {}, ...["at", "service", "signal", "what", "value", "usually"].map((text, at) => make("th", { text, scope: "col", class: at < 4 ? "left" : null })))),
    make("tbody", {}, ...events.slice(0, EVENTS).map(({ time: at, service, signal, what, value, normal, unit, leak }) => make("tr", {},
      make("td", { text: new Date(at).toTimeString().slice(0, 8), "data-title": "at" }),
      make("td", { text: service, "data-title": "service", class: "left" }), make("td", { text: words(signal), "data-title": "signal", class: "left" }),
      make("td", { "data-title": "what", class: "left" }, make("div", {}, make("span", { class: ["began", "descriptor_leak"].includes(what) ? "bad" : null, text: HAPPENED[what] ?? words(what) }), leak ? make("div", { class: "dim leak",
        text: `${number(leak.per_second, 0)} a second in process ${leak.tgid}; most are ${leak.targets.slice(0, 3).map((target) => `${target.count} ${target.kind} ${target.name}`.trim()).join(", ")}` }) : null)),
      make("td", { text: amount(value, unit), "data-title": "value" }), make("td", { text: amount(normal, unit), "data-title": "usually" })))));
}

function tile(title, entries) {
  return make("div", { class: "card tile" }, make("b", { text: title }),
    make("dl", {}, ...entries.filter(([, value]) => known(value)).flatMap(([name, value, level, note]) => [make("dt", { text: name }),
      make("dd", { class: level ?? null }, value, note ? make("span", { class: "dim note", text: note }) : null)])));
}

function drawGpus() {
  const { gpus } = latest;
  $("gpus-section").hidden = !gpus.length;
  $("gpus").replaceChildren(...gpus.map((gpu) => tile(`${gpu.index} ${gpu.name}`, [
    ["busy", known(gpu.utilization_ratio) ? percent(gpu.utilization_ratio, 0) : null],
    ["memory", known(gpu.memory_used_bytes) ? `${bytes(gpu.memory_used_bytes)} of ${bytes(gpu.memory_total_bytes)}` : null],
    ["power", known(gpu.power_watts) ? `${gpu.power_watts.toFixed(0)} W` : null],
    ["temperature", known(gpu.temperature_celsius) ? `${gpu.temperature_celsius} °C` : null],
    ["throttled", gpu.throttled.length ? gpu.throttled.join(", ") : null, "warn"],
    ["XID errors", gpu.xids.length ? gpu.xids.map((xid) => `${xid.xid} (${xid.count}×)`).join(", ") : null, "bad"],
    ["problem", gpu.problem ?? null, "bad"]])));
}

function drawEngines() {
  const rows = latest.engines;
  $("engines-section").hidden = !rows.length;
  $("engines").replaceChildren(
    make("thead", {}, make("tr", {}, ...["model", "engine", "running", "waiting", "KV cache used"].map((text) => make("th", { text, scope: "col" })))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, make("td", { text: modelOf(row) }), make("td", { text: row.engine }), make("td", { text: number(row.running, 0) }),
      make("td", { text: number(row.waiting, 0), class: grade(row.waiting, 0, Infinity) }), make("td", { text: percent(row.kv_cache_usage_ratio) })))));
}

function drawAgent() {
  const { agent } = latest;
  $("version").textContent = `Footlight ${latest.version}`;
  $("agent").replaceChildren(
    tile("What it uses", [["CPU", known(agent.cpu_ratio) ? percent(agent.cpu_ratio) : null], ["memory", known(agent.memory_bytes) ? bytes(agent.memory_bytes) : null],
      ["connections", number(agent.connections, 0)], ["reader restarts", agent.reader_restarts ? String(agent.reader_restarts) : null, "warn"]]),
    tile("Probes", agent.probes.map((probe) => [probe.name, probe.up ? (probe.lost ? `${probe.lost} lost` : "up") : probe.reason || "not up", probe.up ? (probe.lost ? "warn" : null) : "bad"])),
    ...latest.targets.map((target) => tile(target.service, [["processes", String(target.processes)], ["ports", String(target.ports)]])));
}

// ---- going on ----

// Draws everything, after `take` has put in its place what the agent said.
function draw(take = () => {}) {
  try {
    take();
    if (latest) {
      if (chosen && latest.models.length && !latest.models.some((row) => keyOf(row) === chosen)) chosen = "";
      for (const part of [drawModels, drawCauses, drawSlow, drawObjectives, drawHealth, drawGpus, drawEngines, drawAgent]) part();
    }
    if (history_) drawHistory();
  } catch (error) {
    console.error(error);
    say(`The agent answers, but this page cannot draw it (${error.message}): load the page again.`, true);
  }
}

function say(text, bad) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

const asking = () => ({ cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });

async function ask(path) {
  const answer = await fetch(path, asking());
  if (!answer.ok) throw new Error(`${path} answered ${answer.status}`);
  return answer.json();
}

async function live() {
  const told = await ask("api/live").catch((error) => say(`The agent does not answer (${error.message}): what is shown is old.`, true));
  if (told) draw(() => {
    latest = told;
    say(latest.state, !latest.ready);
    $("updated").textContent = `as of ${new Date(latest.time).toTimeString().slice(0, 8)}`;
  });
  setTimeout(live, document.hidden ? 5 * LIVE_MS : LIVE_MS);
}

// Steps before the first request are left out, but for the last five minutes.
function fromTheFirst(told) {
  const first = told.times.findIndex((_, at) => told.models.some((model) => model.requests[at] || model.frames[at]));
  const from = Math.max(0, Math.min(first < 0 ? Infinity : first - 1, told.times.length - Math.round(300 / told.step_seconds)));
  const models = told.models.map((model) => Object.fromEntries(Object.entries(model).map(([name, value]) => [name, Array.isArray(value) ? value.slice(from) : value])));
  return { ...told, times: told.times.slice(from), models };
}

async function past() {
  const told = await ask("api/history").catch(() => null); // live() says so
  if (told) draw(() => { history_ = fromTheFirst(told); });
  setTimeout(past, document.hidden ? 5 * HISTORY_MS : HISTORY_MS);
}

addEventListener("resize", () => history_ && drawHistory());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
past();
live();
