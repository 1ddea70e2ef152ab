(() => {
  const byId = (id) => document.getElementById(id);
  const rows = [...document.querySelectorAll("#table tbody tr")];
  const items = rows.map((row) => ({ row, article: byId("f" + row.dataset.feature) }));
  items.forEach((item) => { item.text = (item.row.textContent + " " + item.article.textContent).toLowerCase(); });

  const find = byId("find"), found = byId("found");
  byId("find-box").hidden = false;
  find.addEventListener("input", () => {
    const wanted = find.value.toLowerCase();
    let count = 0;
    for (const item of items) {
      const fits = item.text.includes(wanted);
      item.row.hidden = item.article.hidden = !fits;
      count += fits;
    }
    found.textContent = wanted ? count + " of " + items.length + " features" : "";
  });

  for (const head of document.querySelectorAll("#table th[data-sort]")) {
    const button = document.createElement("button"), key = head.dataset.sort;
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      document.querySelectorAll("#table th[aria-sort]").forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      items.sort((a, b) => (a.row.dataset[key] - b.row.dataset[key]) * (down ? -1 : 1));
      byId("table").tBodies[0].append(...items.map((item) => item.row));
      byId("features").append(...items.map((item) => item.article));
    });
  }

  const lookup = new Map(Object.entries(JSON.parse(byId("lookup").textContent)));
  const longest = Math.max(0, ...[...lookup.keys()].map((key) => key.length));
  const own = byId("own"), shown = byId("own-shown"), list = byId("own-found");
  byId("try-box").hidden = false;
  byId("no-script").hidden = true;
  own.addEventListener("input", () => {
    const text = own.value, score = new Map();
    shown.replaceChildren();
    list.replaceChildren();
    for (let at = 0; at < text.length;) {
      let size = Math.min(longest, text.length - at), key = "";
      for (; size > 0; size--) {
        key = text.slice(at, at + size);
        if (lookup.has(key)) break;
        if ((at === 0 || text[at - 1] === "\n") && lookup.has(" " + key)) { key = " " + key; break; }
      }
      if (size === 0) { shown.append(text[at]); at += 1; continue; }
      const best = Math.max(...lookup.get(key).map((pair) => pair[1])), mark = document.createElement("span");
      mark.className = "t" + Math.max(1, Math.ceil(6 * best));
      mark.textContent = text.slice(at, at + size);
      mark.title = lookup.get(key).map((pair) => "feature " + pair[0]).join(", ");
      shown.append(mark);
      for (const [feature, share] of lookup.get(key)) {
        const held = score.get(feature) || { share: 0, keys: new Set() };
        held.share = Math.max(held.share, share);
        score.set(feature, { share: held.share, keys: held.keys.add(key) });
      }
      at += size;
    }
    const best = [...score].sort((a, b) => b[1].share - a[1].share).slice(0, 12);
    for (const [feature, held] of best) {
      const line = document.createElement("li"), link = document.createElement("a");
      link.href = "#f" + feature;
      link.textContent = "feature " + feature;
      line.append(link, " fired on " + [...held.keys].map((key) => JSON.stringify(key)).join(", ") + " in up to " + Math.round(100 * held.share) + "% of its examples");
      list.append(line);
    }
    if (text && !best.length) list.append(Object.assign(document.createElement("li"), { textContent: "None of these features fired on these tokens in the examples." }));
  });
})();
