// The page of the stats endpoint: fetches stats.json once a second and shows it. The browser keeps the
// last minutes; no other host is contacted.

const EVERY = 1000; // milliseconds between two requests
const SLOWEST = 30000; // the longest interval after failures
const PATIENCE = 8000; // the time limit of one request
const MINUTES = 5;
const SVG = "http://www.w3.org/2000/svg";

const $ = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

// -- the token: from the fragment, which browsers send to no server, or from the form

const TOKEN = `pidpool-token ${location.pathname}`;
function takeTokenFromFragment() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return false;
  sessionStorage.setItem(TOKEN, token);
  history.replaceState(null, "", location.pathname + location.search);
  return true;
}
takeTokenFromFragment();
window.addEventListener("hashchange", () => takeTokenFromFragment() && ask());

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value.trim());
  $("token").value = "";
  ask();
});

// -- asking

let timer = null;
let failures = 0;
let asking = false;
let paused = false;
let lastAnswer = null; // Date

async function ask() {
  clearTimeout(timer);
  if (asking) return;
  asking = true;
  let again = true;
  try {
    const token = sessionStorage.getItem(TOKEN);
    const response = await fetch("stats.json", {
      cache: "no-store",
      headers: token ? { Authorization: `Bearer ${token}` } : {},
      signal: AbortSignal.timeout(PATIENCE),
    });
    if (response.status === 401) {
      again = false;
      askForToken(Boolean(token));
    } else if (!response.ok) {
      throw new Error((await response.text()).trim());
    } else {
      const stats = await response.json();
      failures = 0;
      lastAnswer = new Date();
      $("token-form").hidden = true;
      $("problem").hidden = true;
      show(stats);
    }
  } catch (error) {
    failures += 1;
    $("problem").hidden = false;
    $("problem").textContent = error instanceof TypeError || error.name === "TimeoutError"
      ? "The application does not answer. It may have ended; the figures below are from its last answer."
      : error.message;
  } finally {
    asking = false;
  }
  showStatus(again);
  // A hidden page sends no requests until it is visible again.
  if (again && !paused && !document.hidden) {
    timer = setTimeout(ask, Math.min(SLOWEST, EVERY * 2 ** failures));
  }
}

function askForToken(wasWrong) {
  sessionStorage.removeItem(TOKEN);
  if ($("token-form").hidden || wasWrong) {
    $("token-form").hidden = false;
    $("problem").hidden = !wasWrong;
    $("problem").textContent = "The token is wrong.";
    $("token").focus();
  }
}

function showStatus(authorized = true) {
  const since = lastAnswer ? `, as of ${lastAnswer.toLocaleTimeString()}` : "";
  const [state, text] = !authorized ? ["connecting", "waiting for the token"]
    : failures ? ["stale", `stale${since}`]
    : paused ? ["paused", `paused${since}`]
    : ["live", "live"];
  if ($("status").dataset.state !== state) $("status").dataset.state = state;
  set($("status-text"), text);
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  if (paused) {
    clearTimeout(timer);
    showStatus();
  } else {
    ask();
  }
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !paused) ask();
});

$("ended").addEventListener("change", () => {
  document.body.classList.toggle("hide-ended", !$("ended").checked);
});

// -- showing: elements are made once for each pool, process and connection, and changed after that

function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function make(template) {
  return $(template).content.firstElementChild.cloneNode(true);
}

/** Give `parent` one element for each item, in the order of the items; existing elements are kept. */
function sync(parent, items, key, template, update) {
  const wanted = new Set(items.map((item) => String(key(item))));
  const there = new Map();
  for (const element of [...parent.children]) {
    if (wanted.has(element.dataset.key)) there.set(element.dataset.key, element);
    else element.remove();
  }
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let element = there.get(name);
    if (!element) {
      element = make(template);
      element.dataset.key = name;
    }
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
    update(element, item);
  }
}

let announced = null;

function show(stats) {
  openStates = stats.open_states ?? [];
  sync($("pools"), stats.pools, (pool) => pool.pool, "pool-template", (section, pool) => {
    showPool(section, pool, stats.bounds);
  });
  set($("answered"), `Answered by pid ${stats.answered_by}.`);
  announce(stats.pools);
}

/** Announce to a screen reader only the processes that started or ended. */
function announce(pools) {
  const now = new Set(pools.flatMap((pool) => pool.processes.filter((each) => each.alive).map((each) => each.pid)));
  if (announced) {
    const came = [...now].filter((pid) => !announced.has(pid));
    const went = [...announced].filter((pid) => !now.has(pid));
    const news = [];
    if (came.length) news.push(`Started: pid ${came.join(", ")}.`);
    if (went.length) news.push(`Ended: pid ${went.join(", ")}.`);
    if (news.length) set($("news"), news.join(" "));
  }
  announced = now;
}

const failedOf = ({ failed }) => Object.values(failed).reduce((sum, count) => sum + count, 0);
let openStates = []; // the states at the fork that count as leaks, from stats.json
const leaksOf = ({ inherited }) => openStates.reduce((sum, state) => sum + (inherited[state] ?? 0), 0);

function showPool(section, pool, bounds) {
  const heading = section.querySelector("h2");
  set(heading, pool.pool);
  heading.id = `pool-${encodeURIComponent(pool.pool)}`;
  section.setAttribute("aria-labelledby", heading.id);

  const figures = {
    used: pool.used,
    idle: pool.idle,
    waiting: pool.waiting,
    alive: pool.alive,
    checkouts: pool.counters.checkouts,
    opened: pool.counters.opened,
    failed: failedOf(pool.counters),
    timeouts: pool.counters.timeouts,
    overdue: pool.overdue, // null without a hold_warning
    leaks: leaksOf(pool.counters),
  };
  for (const tile of section.querySelectorAll("[data-tile]")) {
    const name = tile.dataset.tile;
    const value = figures[name];
    set(tile.querySelector("dd"), value === null ? "–" : value < 10000 ? whole.format(value) : short.format(value));
    tile.classList.toggle("alarm", ["waiting", "failed", "timeouts", "overdue", "leaks"].includes(name) && value > 0);
  }
  showCapacity(section.querySelector(".capacity"), pool);
  showCharts(section, pool, bounds);
  showTree(section.querySelector(".tree"), pool);
  const unlisted = section.querySelector(".unlisted");
  unlisted.hidden = !pool.unlisted;
  set(unlisted, `${whole.format(pool.unlisted)} more processes are not shown: the family's memory has no room for them.`);
}

function showCapacity(capacity, pool) {
  const { used, idle, maximum } = pool;
  const server = pool.server_max_connections;
  const end = Math.max(maximum ?? 0, used + idle, server ?? 0, 1);
  const width = (count) => `${(100 * count) / end}%`;
  capacity.querySelector(".used").style.width = width(used);
  capacity.querySelector(".idle").style.width = width(idle);
  const limit = capacity.querySelector(".limit");
  limit.hidden = maximum === null || maximum >= end;
  limit.style.left = width(maximum ?? 0);
  const byLimit = pool.limit === null ? ""
    : ` (family_limit ${whole.format(pool.limit)}: ${whole.format(pool.permits)} taken, ${whole.format(pool.wanting)} wanted, `
      + `${whole.format(pool.counters.closed["given back"] ?? 0)} given back)`;
  const most = maximum === null ? "without limit" : `${whole.format(maximum)} at most${byLimit}`;
  const ofServer = server === null ? "" : `; the server allows ${whole.format(server)}`;
  const warning = server !== null && maximum !== null && maximum > server
    ? ": the family could open more than the server allows" : "";
  const text = `${whole.format(used + idle)} connections open, ${most}${ofServer}${warning}`;
  set(capacity.querySelector("p"), text);
  capacity.querySelector(".gauge").setAttribute("aria-label", text);
}

// -- the tree

function showTree(tree, pool) {
  const pids = new Set(pool.processes.map((each) => each.pid));
  const childrenOf = new Map();
  for (const process of pool.processes) {
    // A process whose parent is not listed stands at the root.
    const parent = pids.has(process.parent_pid) && process.parent_pid !== process.pid ? process.parent_pid : null;
    if (!childrenOf.has(parent)) childrenOf.set(parent, []);
    childrenOf.get(parent).push(process);
  }
  const branch = (list, parent) => {
    const processes = childrenOf.get(parent) ?? [];
    childrenOf.delete(parent); // a reused pid must not make a circle
    sync(list, processes, (each) => `${each.pid} ${each.since}`, "process-template", (element, process) => {
      showProcess(element, process, pool);
      branch(element.lastElementChild, process.pid);
    });
  };
  branch(tree, null);
}

function showProcess(element, process, pool) {
  const { counters } = process;
  const leaks = leaksOf(counters);
  const foreign = process.connections.some((each) => each.tag.owner_pid !== process.pid);
  element.dataset.pid = process.pid;
  element.dataset.alive = process.alive;
  element.dataset.leak = leaks > 0 || foreign;
  const card = element.firstElementChild;
  set(card.querySelector("h4"), `pid ${process.pid}`);
  const origin = process.parent_pid === null ? "made the pool" : `forked by ${process.parent_pid}`;
  const age = duration(pool.taken_at - process.since);
  set(card.querySelector(".role"), process.alive ? `${origin}, ${age} ago` : `${origin}, has ended`);

  const badge = card.querySelector(".badge");
  badge.hidden = !leaks;
  set(badge, `leak: ${whole.format(leaks)} inherited in use`);

  const most = process.maximum === null ? "no limit" : `of ${process.maximum}`;
  const waiting = process.waiting ? ` · ${process.waiting} waiting` : "";
  set(card.querySelector(".numbers"), process.alive ? `${process.used} used · ${process.idle} idle · ${most}${waiting}` : "");
  set(card.querySelector(".past"), historyOf(counters));

  sync(card.querySelector(".chips"), process.connections, (each) => each.tag.connection_id, "chip-template", (chip, each) => {
    showConnection(chip, each, process);
  });
}

function historyOf(counters) {
  const inherited = Object.entries(counters.inherited).filter(([, count]) => count);
  const parts = [[counters.checkouts, "checkouts"], [counters.opened, "opened"], [counters.timeouts, "timed out"],
    [counters.overdue, "overdue"],
    [counters.invalidations, "invalidated"], [counters.forks, "forks"], [counters.severed, "severed"],
    [counters.closed["given back"] ?? 0, "given back"], [counters.kept, "kept"], [counters.replaced, "replaced"], [counters.refused, "refused"]]
    .filter(([count, name]) => count || name === "checkouts")
    .map(([count, name]) => `${whole.format(count)} ${name}`);
  const failed = Object.entries(counters.failed).filter(([, count]) => count);
  if (failed.length) {
    parts.push(`connects failed: ${failed.map(([error, count]) => `${whole.format(count)} ${error}`).join(", ")}`);
  }
  if (inherited.length) {
    parts.push(`inherited ${inherited.map(([state, count]) => `${whole.format(count)} ${state}`).join(", ")}`);
  }
  return parts.join(" · ");
}

function showConnection(chip, { tag, state, ...connection }, process) {
  const foreign = tag.owner_pid !== process.pid;
  chip.dataset.state = foreign ? "leak" : state;
  set(chip.querySelector(".what"), `${foreign ? `${state}, not its own` : state} ${duration(connection.in_state)}`);
  const server = tag.server_pid === null ? "" : ` server ${tag.server_pid}`;
  set(chip.querySelector(".ids"), `pid ${tag.owner_pid}${tag.fd === null ? "" : ` fd ${tag.fd}`}${server}`);
  const thread = connection.thread_name ?? connection.thread_id;
  const more = `connection ${tag.connection_id}, opened ${duration(connection.age)} ago, `
    + `${whole.format(connection.checkouts)} checkouts${thread === null ? "" : `, thread ${thread}`}`;
  if (chip.title !== more) chip.title = more;
  set(chip.lastElementChild, `, ${more}`);
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (!Number.isFinite(seconds)) return "> 30 s";
  const s = Math.max(0, seconds);
  if (s === 0) return "0 s";
  if (s < 0.001) return `${Math.max(1, Math.round(s * 1e6))} µs`;
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 100) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 129600) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} days`;
}

// -- the last minutes

const past = new Map(); // of each pool: samples, oldest first

function showCharts(section, pool, bounds) {
  const samples = past.get(pool.pool) ?? [];
  past.set(pool.pool, samples);
  const { counters } = pool;
  const before = samples.at(-1);
  if (before && before.at >= pool.taken_at) return;
  const sample = {
    at: pool.taken_at,
    used: pool.used,
    idle: pool.idle,
    checkouts: counters.checkouts,
    waits: counters.wait_time.counts,
    uses: counters.use_time.counts,
    rate: null,
    wait: null,
    use: null,
  };
  if (before) {
    sample.rate = Math.max(0, (sample.checkouts - before.checkouts) / (sample.at - before.at));
    sample.wait = quantile(0.95, difference(sample.waits, before.waits), bounds);
    sample.use = quantile(0.95, difference(sample.uses, before.uses), bounds);
  }
  samples.push(sample);
  while (samples[0].at < sample.at - MINUTES * 60) samples.shift();

  const chart = (name) => section.querySelector(`[data-chart="${name}"]`);
  draw(chart("connections"), samples, [["used", (each) => each.used], ["idle", (each) => each.used + each.idle]],
    (most) => whole.format(most), `${whole.format(sample.used)} used, ${whole.format(sample.idle)} idle`);
  const perSecond = (value) => (value === null ? "–" : value < 10 ? value.toFixed(1) : short.format(Math.round(value)));
  draw(chart("rate"), samples, [["line", (each) => each.rate]], perSecond, perSecond(sample.rate));
  draw(chart("wait"), samples, [["line", (each) => each.wait]], duration, duration(sample.wait));
  draw(chart("use"), samples, [["line", (each) => each.use]], duration, duration(sample.use));
}

function difference(now, before) {
  return now.map((count, index) => count - before[index]);
}

function quantile(q, counts, bounds) {
  const rank = q * counts.reduce((sum, count) => sum + count, 0);
  if (rank <= 0) return null;
  let seen = 0;
  const index = counts.findIndex((count) => (seen += count) >= rank);
  return bounds[index] ?? Infinity;
}

/** Draw curves into a figure; a "line" as a line, other kinds as areas, the last one at the back. */
function draw(figure, samples, curves, format, now) {
  let svg = figure.querySelector("svg");
  if (!svg) {
    svg = figure.appendChild(document.createElementNS(SVG, "svg"));
    svg.setAttribute("viewBox", "0 0 100 100");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    const scale = figure.appendChild(document.createElement("div"));
    scale.className = "scale";
    scale.append(document.createElement("span"), document.createElement("span"));
    path(svg, "base").setAttribute("d", "M0 100H100");
    for (const [kind] of [...curves].reverse()) {
      if (kind === "line") path(svg, "under");
      path(svg, kind === "line" ? "line" : `area ${kind}`);
    }
  }
  const end = samples.at(-1).at;
  const span = Math.max(60, end - samples[0].at);
  const finite = curves.flatMap(([, value]) => samples.map(value)).filter((value) => Number.isFinite(value));
  const most = Math.max(...finite, 0);
  const x = (each) => (100 - (100 * (end - each.at)) / span).toFixed(2);
  const y = (value) => (100 - (100 * Math.min(value, most)) / (most || 1)).toFixed(2);
  for (const [kind, value] of curves) {
    const runs = [[]];
    for (const each of samples) {
      if (value(each) === null) runs.push([]);
      else runs.at(-1).push(each);
    }
    const drawn = runs.filter((run) => run.length);
    const line = drawn.map((run) => `M${run.map((each) => `${x(each)} ${y(value(each))}`).join("L")}${run.length === 1 ? "h.4" : ""}`);
    const area = drawn.map((run, index) => `${line[index]}L${x(run.at(-1))} 100L${x(run[0])} 100Z`);
    if (kind === "line") svg.querySelector(".line").setAttribute("d", line.join(""));
    svg.querySelector(kind === "line" ? ".under" : `.area.${kind}`).setAttribute("d", area.join(""));
  }
  set(figure.querySelector("strong"), now);
  const [from, to] = figure.querySelectorAll(".scale span");
  set(from, `${duration(span)} ago`);
  set(to, `highest ${format(most)}`);
  const caption = figure.querySelector("figcaption").firstChild.textContent.trim();
  svg.setAttribute("aria-label", `${caption} over the last ${duration(span)}: now ${now}, highest ${format(most)}`);
}

function path(svg, kind) {
  const element = svg.appendChild(document.createElementNS(SVG, "path"));
  element.setAttribute("class", kind);
  element.setAttribute("vector-effect", "non-scaling-stroke");
  return element;
}

ask();
