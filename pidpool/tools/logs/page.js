"use strict";
// Draws the page's data. Values from the log get into the page as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const ROW = 11, MOST_ROWS = 8, LANE = 46, AXIS = 28, SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);

  // -- small things

  function put(parent, name, attributes, text) {
    const element = parent instanceof SVGElement || name === "svg"
      ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  const number = (value) => value.toLocaleString("en-GB");
  const count = (value, noun, nouns) => `${number(value)} ${value === 1 ? noun : nouns || noun + "s"}`;
  const known = (value) => (value === null || value === undefined ? "?" : String(value));

  function duration(seconds) {
    const two = (whole, large, name, small, rest) => {
      const left = Math.floor((whole % large) / small);
      return `${Math.floor(whole / large)} ${name}` + (left ? ` ${left} ${rest}` : "");
    };
    if (seconds < 0.0009995) return `${Number((seconds * 1e6).toPrecision(3))} µs`;
    if (seconds < 0.9995) return `${Number((seconds * 1e3).toPrecision(3))} ms`;
    if (seconds < 59.95) return `${Number(seconds.toPrecision(3))} s`;
    const whole = Math.round(seconds);
    if (whole < 3600) return two(whole, 60, "min", 1, "s");
    if (whole < 172800) return two(whole, 3600, "h", 60, "min");
    return two(whole, 86400, "d", 3600, "h");
  }

  const iso = (at) => new Date(at * 1000).toISOString();
  const clock = (at) => iso(at).slice(11, 23);
  const severalDays = data.from !== null && iso(data.from).slice(0, 10) !== iso(data.to).slice(0, 10);
  const moment = (at) => (severalDays ? `${iso(at).slice(0, 10)} ${clock(at)}` : clock(at));

  // -- the facts

  byId("files").textContent = data.files.join("  ") + (data.moreFiles ? `  and ${number(data.moreFiles)} more` : "");
  if (data.from === null) {
    byId("range").textContent = "No events of pidpool in these logs.";
    return;
  }
  byId("range").textContent =
    `${iso(data.from).slice(0, 10)} ${clock(data.from)} to ${severalDays ? iso(data.to).slice(0, 10) + " " : ""}` +
    `${clock(data.to)} UTC, ${duration(data.to - data.from)}; ${count(data.events, "event")}` +
    (data.foreign ? `, ${count(data.foreign, "other line")}` : "");
  for (const [name, value, kind] of [
    ["transactions leaked", number(data.openLeakCount), data.openLeakCount ? "bad" : "good"],
    ["leaks", number(data.leakCount), ""],
    ["processes", number(data.processes), ""],
    ["opened", number(data.opened), ""],
    ["checkouts", number(data.checkouts), ""],
    ["longest wait", data.longestWait === null ? "–" : duration(data.longestWait), ""],
    ["longest hold", data.longestHold === null ? "–" : duration(data.longestHold), ""],
    ["timed out", number(data.timedOut), data.timedOut ? "warn" : ""],
    ["not returned", number(data.notReturned), data.notReturned ? "warn" : ""],
  ]) {
    const tile = put(byId("facts"), "div", { class: kind });
    put(tile, "dt", {}, name);
    put(tile, "dd", {}, value);
  }
  document.querySelector("main").hidden = false;

  // -- the marks: the elements that can be pointed at, in the order of the arrow keys

  const lanes = data.lanes.map((lane, index) => ({ ...lane, index, marks: [], rows: [] }));
  const marks = [];

  function mark(lane, kind, from, to, title, lines, more) {
    const one = { lane, kind, from, to, title, lines: lines.filter(([, value]) => value !== null && value !== undefined && value !== ""), ...more };
    lanes[lane].marks.push(one);
    marks.push(one);
    return one;
  }

  for (const [lane, from, back, connection, serverPid, pool, wait, where, fields] of data.bars) {
    const to = back === null ? data.to : back;
    mark(lane, "hold", from, to, `${connection} checked out for ${duration(to - from)}${back === null ? " and not returned" : ""}`, [
      ["process", `pid ${lanes[lane].id}`], ["from", moment(from)],
      ["until", back === null ? "the end of the log" : moment(back)],
      ["waited", duration(wait)], ["server pid", serverPid], ["pool", pool], ["checked out at", where],
      ...Object.entries(fields),
    ], { out: back === null, late: where !== null });
  }
  for (const [lane, from, wait, size, overflow, checkedOut] of data.timeouts) {
    mark(lane, "waited", from, from + wait, `no connection was free for ${duration(wait)}`, [
      ["process", `pid ${lanes[lane].id}`], ["asked", moment(from)], ["gave up", moment(from + wait)],
      ["size", size], ["overflow", overflow], ["checked out", checkedOut],
    ]);
  }
  const abreast = new Map(); // leaks of one fork stand side by side
  const leakMarks = data.leaks.map((leak) => {
    const key = `${leak.inheritor} ${leak.at.toFixed(1)}`;
    const place = abreast.get(key) || 0;
    abreast.set(key, place + 1);
    return mark(leak.inheritor, "leak", leak.at, leak.at,
      `connection ${leak.connection} crossed a fork${leak.open ? " with an open transaction" : ""}`, [
        ["owner", `pid ${lanes[leak.owner].id}`], ["inherited by", `pid ${lanes[leak.inheritor].id}`],
        ["at", moment(leak.at)], ["state", leak.state], ["done", leak.outcome],
        ["descriptor", known(leak.fd)], ["server pid", known(leak.serverPid)], ["pool", leak.pool],
        ["checked out at", leak.where], ["forked at", leak.forkLine], ...Object.entries(leak.fields),
      ], { leak, place: Math.min(place, 7) });
  });
  const unmatchedMarks = data.unmatchedForks.map(([owner, at, pool, idle, checkedOut, inTransaction, state, forkLine]) => {
    const open = inTransaction > 0;
    return mark(owner, "leak", at, at,
      `${count(idle + checkedOut, "connection")} crossed a fork${open ? `, ${number(inTransaction)} with an open transaction` : ""}`, [
        ["owner", `pid ${lanes[owner].id}`], ["inherited by", "a child without events"], ["at", moment(at)],
        ["in transaction", inTransaction], ["no transaction", checkedOut - inTransaction], ["idle", idle], ["pool", pool],
        ["forked at", forkLine],
      ], { leak: { owner, inheritor: null, open, state }, place: -1 });
  });

  let top = AXIS;
  for (const lane of lanes) {
    lane.marks.sort((a, b) => a.from - b.from || a.to - b.to);
    for (const one of lane.marks) {
      if (one.kind === "leak") continue;
      let row = lane.rows.findIndex((end) => end <= one.from);
      if (row < 0) row = lane.rows.length < MOST_ROWS ? lane.rows.length : MOST_ROWS - 1;
      lane.rows[row] = Math.max(lane.rows[row] || 0, one.to);
      one.row = row;
    }
    lane.top = top;
    lane.height = Math.max(LANE, 28 + lane.rows.length * ROW);
    lane.line = top + 12;
    top += lane.height;
    const label = put(byId("labels"), "div", {});
    label.style.height = `${lane.height}px`;
    label.style.paddingLeft = `${12 + Math.min(lane.depth, 8) * (innerWidth < 720 ? 6 : 14)}px`;
    put(label, "b", {}, `pid ${lane.id}`);
    put(label, "span", {}, lane.checkouts ? count(lane.checkouts, "checkout") : lane.opened ? `${number(lane.opened)} opened` : "no checkouts");
    label.title = `pid ${lane.id}  ${lane.pools.join(", ")}`;
  }
  const height = top;
  marks.sort((a, b) => a.lane - b.lane || a.from - b.from);
  marks.forEach((one, index) => { one.index = index; });
  let current = [...leakMarks, ...unmatchedMarks, { index: 0 }][0].index;
  let kept = -1;

  // -- drawing

  const plot = byId("plot"), tip = byId("tip"), detail = byId("detail");
  const span = Math.max(data.to - data.from, 1e-3);
  const all = { from: data.from - span * 0.03, to: data.to + span * 0.05 };
  let view = { ...all };
  const STEPS = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 15, 30, 60, 120, 300,
    600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800, 2592000, 31536000];

  function tickText(at, step) {
    if (step >= 86400) return iso(at).slice(0, 10);
    if (step >= 60) return (severalDays ? iso(at).slice(5, 10) + " " : "") + iso(at).slice(11, 16);
    if (step >= 1) return iso(at).slice(11, 19);
    if (step >= 1e-3) return iso(at + 5e-4).slice(14, 23);
    return `${iso(at).slice(14, 19)}.${String(Math.round((at % 1) * 1e4)).padStart(4, "0")}`;
  }

  function draw() {
    const width = plot.clientWidth;
    const x = (at) => ((at - view.from) / (view.to - view.from)) * width;
    const seen = (from, to) => to >= view.from && from <= view.to;
    const hadFocus = plot.contains(document.activeElement);
    plot.replaceChildren();
    const svg = put(plot, "svg", { width, height, role: "application", "aria-label": "Timeline of the processes; arrow keys go from mark to mark" });

    for (const lane of lanes) {
      if (lane.index % 2 === 0) put(svg, "rect", { class: "stripe", x: 0, y: lane.top, width, height: lane.height });
    }
    const step = STEPS.find((one) => one / (view.to - view.from) * width >= 92) || STEPS[STEPS.length - 1];
    for (let n = Math.ceil(view.from / step); n * step <= view.to; n++) {
      const at = n * step, place = x(at);
      put(svg, "line", { class: "tick", x1: place, x2: place, y1: AXIS - 6, y2: height });
      if (place > 34 && place < width - 34) put(svg, "text", { class: "time", x: place, y: 16, "text-anchor": "middle" }, tickText(at, step));
    }
    for (const lane of lanes) {
      const begin = x(lane.forked === null ? lane.from : lane.forked);
      put(svg, "line", { class: "life", x1: Math.max(-5, begin), x2: Math.min(width + 5, Math.max(x(lane.to), begin + 4)), y1: lane.line, y2: lane.line });
      if (lane.parent !== null && lane.forked !== null && seen(lane.forked, lane.forked)) {
        put(svg, "path", { class: "fork", d: `M${begin} ${lanes[lane.parent].line}V${lane.line}` });
        put(svg, "circle", { class: "forked", cx: begin, cy: lane.line, r: 3.5 });
      }
    }
    for (const one of marks) {
      if (one.kind === "leak" || !seen(one.from, one.to)) continue;
      const group = putMark(svg, one);
      const lane = lanes[one.lane], y = lane.top + 22 + one.row * ROW;
      const from = Math.max(-4, x(one.from)), to = Math.min(width + 4, x(one.to)), wide = Math.max(2.5, to - from);
      if (one.kind === "waited") {
        put(group, "path", { class: "waited", d: `M${from} ${y + 4}H${from + wide}M${from} ${y}V${y + 8}M${from + wide} ${y}V${y + 8}` });
        put(group, "rect", { x: from, y, width: wide, height: 8, fill: "transparent" });
      } else {
        put(group, "rect", { class: `hold${one.late ? " late" : ""}${one.out ? " out" : ""}`, x: from, y, width: wide, height: 8, rx: Math.min(2, wide / 2) });
      }
    }
    for (const one of [...leakMarks, ...unmatchedMarks]) { // last, so that nothing lies over them
      if (!seen(one.from, one.to)) continue;
      const group = putMark(svg, one);
      const y = lanes[one.lane].line, from = lanes[one.leak.owner].line, fork = x(one.from), place = fork + 12 + one.place * 13;
      const open = one.leak.open ? " open" : "", size = one.leak.open ? 7 : 5.5;
      if (one.leak.inheritor !== null) put(group, "path", { class: `thread${open}`, d: `M${fork + 3} ${from}C${place + 8} ${from} ${place} ${(from + y) / 2} ${place} ${y - (y > from ? size : -size)}` });
      put(group, "path", { class: `leak${open}`, d: `M${place} ${y - size}L${place + size} ${y}L${place} ${y + size}L${place - size} ${y}Z` });
    }
    if (hadFocus) focus(current);
  }

  function putMark(svg, one) {
    const text = [one.title, ...one.lines.map(([name, value]) => `${name} ${value}`)].join("; ");
    return put(svg, "g", {
      "data-mark": one.index, role: "img", "aria-label": text,
      tabindex: one.index === current ? 0 : -1, class: one.index === kept ? "kept" : "",
    });
  }

  const elementOf = (index) => plot.querySelector(`[data-mark="${index}"]`);

  function focus(index) {
    const before = elementOf(current);
    if (before) before.setAttribute("tabindex", -1);
    current = index;
    const element = elementOf(index);
    if (!element) return;
    element.setAttribute("tabindex", 0);
    element.focus({ preventScroll: true });
    element.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  function go(index) {
    const one = marks[index];
    if (one.to < view.from || one.from > view.to) {
      const half = (view.to - view.from) / 2;
      show(one.from - half, one.from + half);
    }
    focus(index);
  }

  function show(from, to) {
    const wide = Math.min(Math.max(to - from, 2e-4), all.to - all.from);
    const begin = Math.min(Math.max(from, all.from), all.to - wide);
    view = { from: begin, to: begin + wide };
    hide();
    draw();
    offerTab();
  }

  function offerTab() { // Tab reaches one mark, the arrow keys the others
    if (!elementOf(current)) {
      const first = plot.querySelector("[data-mark]");
      if (first) { current = Number(first.dataset.mark); first.setAttribute("tabindex", 0); }
    }
  }

  function zoom(factor, around) {
    const centre = around === undefined ? (view.from + view.to) / 2 : around;
    show(centre - (centre - view.from) * factor, centre + (view.to - centre) * factor);
  }

  const shift = (part) => { const by = (view.to - view.from) * part; show(view.from + by, view.to + by); };

  // -- reading a mark

  function describe(into, one) {
    into.replaceChildren();
    into.classList.toggle("leaked", one.kind === "leak");
    const event = put(into, "div", { class: "event" });
    put(event, "h3", {}, one.title);
    const list = put(event, "dl");
    for (const [name, value] of one.lines) {
      put(list, "dt", {}, name);
      put(list, "dd", {}, value);
    }
    into.hidden = false;
  }

  function hint(one, left, below) {
    describe(tip, one);
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(left + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${below + 18 + box.height > innerHeight ? Math.max(8, below - box.height - 14) : below + 18}px`;
  }

  const hide = () => { tip.hidden = true; };
  const markOf = (event) => {
    const element = event.target.closest && event.target.closest("[data-mark]");
    return element ? marks[Number(element.dataset.mark)] : null;
  };

  function keep(one) {
    kept = one.index;
    describe(detail, one);
    hide(); // the tip would repeat it
    for (const element of plot.querySelectorAll("[data-mark]")) element.classList.toggle("kept", Number(element.dataset.mark) === kept);
  }

  plot.addEventListener("pointermove", (event) => {
    const one = drag ? null : markOf(event);
    if (one) hint(one, event.clientX, event.clientY);
    else if (!plot.contains(document.activeElement)) hide();
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("focusin", (event) => {
    const one = markOf(event);
    if (!one) return;
    current = one.index;
    const box = event.target.lastElementChild.getBoundingClientRect();
    hint(one, box.left, box.bottom - 8);
  });
  plot.addEventListener("focusout", hide);

  plot.addEventListener("keydown", (event) => {
    const here = marks[current];
    if (!here || event.ctrlKey || event.metaKey || event.altKey) return;
    const inLane = lanes[here.lane].marks;
    const at = inLane.indexOf(here);
    let next = null;
    if (event.key === "ArrowRight") next = inLane[at + 1];
    else if (event.key === "ArrowLeft") next = inLane[at - 1];
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const by = event.key === "ArrowDown" ? 1 : -1;
      for (let n = here.lane + by; n >= 0 && n < lanes.length && !next; n += by) {
        next = lanes[n].marks.reduce((best, one) => (!best || Math.abs(one.from - here.from) < Math.abs(best.from - here.from) ? one : best), null);
      }
    } else if (event.key === "Home") next = inLane[0];
    else if (event.key === "End") next = inLane[inLane.length - 1];
    else if (event.key === "Enter" || event.key === " ") keep(here);
    else if (event.key === "Escape") { hide(); detail.hidden = true; }
    else if (event.key === "+") zoom(0.5, here.from);
    else if (event.key === "-") zoom(2, here.from);
    else return;
    event.preventDefault();
    if (next) go(next.index);
  });

  // -- moving about

  let drag = null;
  plot.addEventListener("pointerdown", (event) => {
    if (event.button === 0) drag = { x: event.clientX, from: view.from, to: view.to, moved: false };
  });
  addEventListener("pointermove", (event) => {
    if (!drag || Math.abs(event.clientX - drag.x) < 4 && !drag.moved) return;
    drag.moved = true;
    plot.classList.add("dragged");
    const by = ((drag.x - event.clientX) / plot.clientWidth) * (drag.to - drag.from);
    show(drag.from + by, drag.to + by);
  });
  addEventListener("pointerup", () => {
    plot.classList.remove("dragged");
    setTimeout(() => { drag = null; });
  });
  addEventListener("pointercancel", () => { drag = null; plot.classList.remove("dragged"); });
  plot.addEventListener("click", (event) => {
    const one = markOf(event);
    if (!one || (drag && drag.moved)) return;
    focus(one.index);
    keep(one);
  });
  plot.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    const part = (event.clientX - plot.getBoundingClientRect().left) / plot.clientWidth;
    zoom(event.deltaY > 0 ? 1.25 : 0.8, view.from + part * (view.to - view.from));
  }, { passive: false });
  byId("earlier").addEventListener("click", () => shift(-0.5));
  byId("later").addEventListener("click", () => shift(0.5));
  byId("closer").addEventListener("click", () => zoom(0.5));
  byId("wider").addEventListener("click", () => zoom(2));
  byId("whole").addEventListener("click", () => show(all.from, all.to));
  new ResizeObserver(() => draw()).observe(plot);

  // -- the leaks as a list

  byId("leaks-title").textContent = data.leakCount
    ? `${count(data.leakCount, "connection")} crossed a fork, ${number(data.openLeakCount)} with an open transaction`
    : "No connection crossed a fork";
  if (data.forkLines.some(([line]) => line !== null)) {
    const table = put(byId("fork-lines"), "table");
    const head = put(put(table, "thead"), "tr");
    for (const name of ["forked at", "leaks", "with an open transaction"]) put(head, "th", { scope: "col" }, name);
    const body = put(table, "tbody");
    for (const [line, leaks, open] of data.forkLines) {
      const row = put(body, "tr");
      put(row, "td", { "data-name": "forked at" }, line === null ? "an unknown line" : line);
      put(row, "td", { "data-name": "leaks" }, number(leaks));
      put(row, "td", { "data-name": "with an open transaction", class: open ? "state open" : "" }, number(open));
    }
  }
  const listed = [...leakMarks, ...unmatchedMarks];
  if (listed.length) {
    const table = put(byId("leak-list"), "table");
    const head = put(put(table, "thead"), "tr");
    const COLUMNS = ["at", "owner", "inherited by", "descriptor", "server pid", "state", "done", "checked out at", "forked at"];
    for (const name of ["connection", ...COLUMNS]) put(head, "th", { scope: "col" }, name);
    const body = put(table, "tbody");
    for (const one of listed) {
      const value = new Map(one.lines), row = put(body, "tr"), name = one.leak.connection || "fork";
      const button = put(put(row, "td"), "button", { type: "button", "aria-label": `Show ${name} of ${value.get("owner")} in the timeline` }, name);
      button.addEventListener("click", () => { go(one.index); keep(one); });
      for (const column of COLUMNS) {
        const text = column === "state" ? one.leak.state : value.get(column);
        put(row, "td", { "data-name": column, class: column === "state" && one.leak.open ? "state open" : "" }, text === undefined ? "–" : text);
      }
    }
  }
  byId("left-out").hidden = !data.leftOut.length;
  for (const text of data.leftOut) put(byId("left-out").querySelector("ul"), "li", {}, text);
  document.documentElement.dataset.drawn = "yes";
})();
