(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const STEPS = [[0, -1], [1, 0], [0, 0], [-1, 0], [0, 1]], WALKS = [0, 1, 3, 4], MOVES = data.moves.length, TILE = 20;
  const KEYS = { ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1] };
  const board = at("board");
  const state = { maze: 0, mode: "steer", cheese: 0, corner: 0, random: false, set: "fields", view: "field", chosen: 0 };

  const short = (value) => value === null || value === undefined ? "–" : value >= 0.9995 ? "1" : value < 0.0005 ? "0" : value.toFixed(3).replace(/^0/, "");
  const times = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value);
  const read = (text) => {
    const raw = atob(text), found = new Float32Array(raw.length);
    for (let first = 0; first < raw.length; first += MOVES) {
      let total = 0;
      for (let move = 0; move < MOVES; move++) total += found[first + move] = (raw.charCodeAt(first + move) / 255) ** 2;
      for (let move = 0; move < MOVES; move++) found[first + move] /= total;
    }
    return found;
  };

  const opened = new Map();
  const open = (index) => {
    if (!opened.has(index)) {
      const maze = data.mazes[index], place = new Map(maze.squares.map((square, number) => [square.join(), number]));
      const rows = maze.squares.map((square) => square[0]), cols = maze.squares.map((square) => square[1]);
      const one = { maze, place, size: maze.squares.length, fields: read(maze.steering.fields), random: read(maze.steering.random) };
      one.top = Math.max(Math.min(...rows) - 1, 0); one.left = Math.max(Math.min(...cols) - 1, 0);
      one.rows = Math.min(Math.max(...rows) + 1, maze.world - 1) - one.top + 1; one.cols = Math.min(Math.max(...cols) + 1, maze.world - 1) - one.left + 1;
      one.index = (square) => square ? place.get(square.join()) ?? -1 : -1;
      if (maze.retargeting) for (const name of ["none", "fields", "other"]) one["sent " + name] = read(maze.retargeting[name]);
      opened.set(index, one);
    }
    return opened.get(index);
  };
  const beside = (one, number, step) => one.index([one.maze.squares[number][0] + step[0], one.maze.squares[number][1] + step[1]]);
  const ways = (one, goal) => {                       // the move towards `goal` from every square; -1 at the goal
    const found = new Int8Array(one.size).fill(-1), seen = new Uint8Array(one.size);
    if (goal < 0) return found;
    const waiting = [goal];
    seen[goal] = 1;
    for (let next = 0; next < waiting.length; next++) {
      for (const move of WALKS) {
        const from = beside(one, waiting[next], [-STEPS[move][0], -STEPS[move][1]]);
        if (from >= 0 && !seen[from]) { seen[from] = 1; found[from] = move; waiting.push(from); }
      }
    }
    return found;
  };

  // ---- which field is shown
  const zero = (list) => list.indexOf(0);
  const part = (one, all, number) => all.subarray(number * one.size * MOVES, (number + 1) * one.size * MOVES);
  const steered = (one, cheese, corner) => part(one, one.fields, cheese * one.maze.steering.corner_coefs.length + corner);
  const shown = (one) => {
    const steering = one.maze.steering;
    if (state.mode === "steer") {
      const base = steered(one, zero(steering.coefs), zero(steering.corner_coefs));
      return { base, now: state.random ? part(one, one.random, state.cheese) : steered(one, state.cheese, state.corner) };
    }
    const base = one["sent none"], pixel = one.maze.retargeting.pixel[state.chosen];
    return { base, now: state.set === "none" ? base : part(one, one["sent " + state.set], pixel) };
  };

  // ---- drawing
  const escape = (text) => String(text).replace(/[&<>"]/g, (letter) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[letter]);
  const fixed = (value) => Math.round(value * 100) / 100;
  const corner = (one, square) => [(square[1] - one.left) * TILE, (square[0] - one.top) * TILE];
  const sprite = (one, name, square, told) => {
    if (!square) return "";
    const [x, y] = corner(one, square);
    return `<use href="#sprite-${name}" x="${x}" y="${y}" width="${TILE}" height="${TILE}"${name === "mouse" ? ' opacity=".5"' : ""}><title>${told}</title></use>`;
  };
  const arrow = (x, y, across, down, kind) => {
    const length = Math.hypot(across, down);
    if (length < 0.05) return `<circle cx="${x}" cy="${y}" r="1.2" fill="currentColor"/>`;
    const reach = TILE * 0.43 * Math.min(length, 1), u = across / length, v = down / length, size = Math.min(TILE * 0.27, Math.max(2, reach));
    const tip = [x + reach * u, y + reach * v], back = [tip[0] - size * u, tip[1] - size * v], wide = size * 0.6;
    const shaft = `M${fixed(x - reach * u)} ${fixed(y - reach * v)}L${fixed(tip[0] - size * 0.7 * u)} ${fixed(tip[1] - size * 0.7 * v)}`;
    const head = `M${fixed(tip[0])} ${fixed(tip[1])}L${fixed(back[0] - wide * v)} ${fixed(back[1] + wide * u)}L${fixed(back[0] + wide * v)} ${fixed(back[1] - wide * u)}Z`;
    return `<g class="arrow ${kind}"><path d="${shaft}"/><path class="head" d="${head}"/></g>`;
  };
  const draw = () => {
    const one = open(state.maze), maze = one.maze, { base, now } = shown(one), retargets = state.mode === "retarget";
    const goal = retargets ? state.chosen : one.index(maze.cheese), toGoal = ways(one, goal), toCorner = ways(one, one.index(maze.corner));
    const differs = state.view === "difference";
    const parts = [];
    maze.squares.forEach((square, number) => {
      const [x, y] = corner(one, square);
      let change = 0;
      for (let move = 0; move < MOVES; move++) change += Math.abs(now[number * MOVES + move] - base[number * MOVES + move]) / 2;
      parts.push(`<rect class="floor" x="${x}" y="${y}" width="${TILE}" height="${TILE}"/>`);
      if (differs) parts.push(`<rect class="change" x="${x}" y="${y}" width="${TILE}" height="${TILE}" fill-opacity="${fixed(0.42 * change)}"/>`);
    });
    parts.push(sprite(one, "flag", maze.corner, "top-right corner"));
    if (!retargets) parts.push(sprite(one, "cheese", maze.cheese, "cheese"));
    if (!retargets && maze.decision) {
      const [x, y] = corner(one, maze.decision);
      parts.push(`<circle class="ring" cx="${x + TILE / 2}" cy="${y + TILE / 2}" r="${TILE * 0.44}"/>`);
    }
    parts.push(sprite(one, "mouse", maze.mouse, "mouse"));
    maze.squares.forEach((square, number) => {
      const [x, y] = corner(one, square), values = [];
      for (let move = 0; move < MOVES; move++) values.push(now[number * MOVES + move] - (differs ? base[number * MOVES + move] : 0));
      const best = WALKS.reduce((a, b) => values[b] > values[a] ? b : a), isGoal = best === toGoal[number], isCorner = best === toCorner[number];
      const kind = isGoal && isCorner ? "both" : isGoal ? "goal" : isCorner ? "corner" : "neither";
      let across = 0, down = 0;
      values.forEach((value, move) => { down += value * STEPS[move][0]; across += value * STEPS[move][1]; });
      if (retargets || number !== goal) parts.push(arrow(x + TILE / 2, y + TILE / 2, across, down, kind));
      parts.push(`<rect class="hit" data-square="${number}" x="${x}" y="${y}" width="${TILE}" height="${TILE}"><title>${escape(told(square, values))}</title></rect>`);
    });
    const [x, y] = corner(one, maze.squares[state.chosen]);
    parts.push(`<rect class="chosen" pointer-events="none" x="${x + 1}" y="${y + 1}" width="${TILE - 2}" height="${TILE - 2}" rx="2"/>`);
    board.setAttribute("viewBox", `-4 -4 ${one.cols * TILE + 8} ${one.rows * TILE + 8}`);
    board.style.color = "#2b2b33";
    board.style.maxWidth = `${Math.min(640, 48 * one.cols)}px`;
    board.innerHTML = parts.join("");
  };

  // ---- words and numbers
  const told = (square, values) => `row ${square[0]}, column ${square[1]}: ` + data.moves.map((name, move) => `${name} ${values[move] < 0 ? "−" : ""}${short(Math.abs(values[move]))}`).join(", ");
  const table = (caption, heads, rows) => {
    const readout = at("readout");
    readout.querySelector("caption").textContent = caption;
    readout.querySelector("thead").innerHTML = `<tr>${heads.map((head) => `<th scope="col">${escape(head)}</th>`).join("")}</tr>`;
    readout.querySelector("tbody").innerHTML = rows.map(([name, ...cells]) =>
      `<tr><th scope="row">${escape(name)}</th>${cells.map((cell, place) => `<td${place === 1 ? ' class="now"' : ""}>${short(cell)}</td>`).join("")}</tr>`).join("");
  };
  const tellSteering = (one) => {
    const steering = one.maze.steering, none = steering.facts[zero(steering.coefs)][zero(steering.corner_coefs)];
    const chance = steering.random_facts[state.cheese], now = state.random ? chance : steering.facts[state.cheese][state.corner];
    const names = { cheese: "step to the cheese", corner: "step to the corner", other: "other moves", "way to cheese": "whole way to the cheese", "way to corner": "whole way to the corner" };
    const fields = Object.keys(names).filter((name) => one.maze.decision || name.startsWith("way"));
    const where = one.maze.decision ? "Steps: at the decision square. " : "This maze has no decision square: the ways to cheese and corner do not part. ";
    table(`${where}Whole ways: geometric mean of their moves. Random: a direction of the same norm (${short2(steering.norm)}), the same cheese coefficient.`,
      ["", "no edit", "now", "random"], fields.map((name) => [names[name], none[name], now[name], chance[name]]));
  };
  const short2 = (value) => value === null ? "–" : value.toPrecision(3);
  const tellSending = (one) => {
    const found = one.maze.retargeting.ways, now = found[{ fields: "set", other: "other channels", none: "no edit" }[state.set]];
    const square = one.maze.squares[state.chosen];
    table(`The whole way from the mouse to the chosen square (row ${square[0]}, column ${square[1]}): geometric mean of its moves.`,
      ["", "no edit", "now", "other channels", "real cheese"],
      [["way to the target", found["no edit"][state.chosen], now[state.chosen], found["other channels"][state.chosen], found["real cheese"][state.chosen]]]);
  };
  const tell = () => {
    const one = open(state.maze), steering = one.maze.steering, { now } = shown(one), square = one.maze.squares[state.chosen];
    const values = Array.from(now.subarray(state.chosen * MOVES, (state.chosen + 1) * MOVES));
    if (state.mode === "steer") tellSteering(one); else tellSending(one);
    at("told").textContent = `Chosen square, ${told(square, values)}.`;
    for (const [name, list] of [["cheese", steering.coefs], ["corner", steering.corner_coefs]]) {
      at(name + "-value").textContent = times(list[state[name]]);
      at(name).setAttribute("aria-valuetext", times(list[state[name]]));
    }
  };

  // ---- controls
  const show = () => {
    const one = open(state.maze), steering = one.maze.steering, retargets = state.mode === "retarget";
    for (const [name, list] of [["cheese", steering.coefs], ["corner", steering.corner_coefs]]) {
      at(name).max = list.length - 1; at(name).min = 0; at(name).value = state[name];
    }
    at("corner").disabled = steering.corner_coefs.length < 2 || state.random;
    at("corner-note").hidden = steering.corner_coefs.length > 1;
    at("random").checked = state.random;
    at("steer").hidden = retargets;
    at("retarget").hidden = !retargets;
    at("key-goal").textContent = retargets ? "to the target" : "to the cheese";
    board.setAttribute("aria-label", retargets ? "The maze. Arrow keys choose the target." : "The maze. Arrow keys choose a square to read.");
    for (const name of ["mode", "view", "set"]) document.querySelector(`input[name="${name}"][value="${state[name]}"]`).checked = true;
    draw();
    tell();
  };
  const noEdit = () => {
    const steering = open(state.maze).maze.steering;
    Object.assign(state, { cheese: zero(steering.coefs), corner: zero(steering.corner_coefs), random: false, set: state.mode === "retarget" ? "none" : "fields" });
  };
  const start = (index) => {                          // another maze keeps the coefficients where it has them
    const before = open(state.maze).maze.steering, kept = [before.coefs[state.cheese], before.corner_coefs[state.corner]];
    state.maze = index;
    const one = open(index), steering = one.maze.steering;
    state.cheese = steering.coefs.indexOf(kept[0]);
    state.corner = steering.corner_coefs.includes(kept[1]) ? steering.corner_coefs.indexOf(kept[1]) : zero(steering.corner_coefs);
    state.chosen = Math.max(one.index(one.maze.decision ?? one.maze.cheese), 0);
  };
  const move = (step) => {                            // to the next free square that way, over walls where need be
    const one = open(state.maze), [row, col] = one.maze.squares[state.chosen];
    for (let far = 1; far < one.maze.world; far++) {
      const number = one.index([row + step[0] * far, col + step[1] * far]);
      if (number >= 0) { state.chosen = number; return; }
    }
  };

  data.mazes.forEach((maze, index) => at("maze").add(new Option(`${maze.seed}: ${maze.size} × ${maze.size}${maze.edits.length ? ", edited" : ""}`, index)));
  if (data.aim) {
    const many = data.aim.channels.length > 1 ? "Channels" : "Channel", values = data.aim.values.map(short2).join(", ");
    at("set-told").textContent = `${many} ${data.aim.channels.join(", ")} to ${values}`;
    at("other-told").textContent = `Control: the same values in channel${data.mazes[0].retargeting.other_channels.length > 1 ? "s" : ""} ${data.mazes[0].retargeting.other_channels.join(", ")}`;
  } else at("retarget-choice").hidden = true;
  at("maze").addEventListener("change", (event) => { start(+event.target.value); show(); });
  for (const name of ["cheese", "corner"]) at(name).addEventListener("input", (event) => { state[name] = +event.target.value; show(); });
  at("random").addEventListener("change", (event) => { state.random = event.target.checked; show(); });
  at("reset").addEventListener("click", () => { noEdit(); show(); });
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const name of ["mode", "view", "set"]) {
    for (const one of document.querySelectorAll(`input[name="${name}"]`)) one.addEventListener("change", () => { state[name] = one.value; if (name === "mode") state.set = "fields"; show(); });
  }
  board.addEventListener("click", (event) => {
    const hit = event.target.closest("[data-square]");
    if (hit) { state.chosen = +hit.dataset.square; show(); }
  });
  board.addEventListener("keydown", (event) => {
    if (KEYS[event.key]) { move(KEYS[event.key]); event.preventDefault(); show(); }
  });
  at("no-script").hidden = true;
  at("bench").hidden = false;
  noEdit();
  start(0);
  show();
})();
