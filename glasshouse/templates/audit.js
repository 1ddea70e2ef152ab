(() => {
  const root = document.documentElement, button = document.getElementById("theme"), order = ["auto", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("glasshouse-theme"); } catch { return null; } };
  const store = (value) => { try { localStorage.setItem("glasshouse-theme", value); } catch { /* a file page may have no storage */ } };
  const show = (value) => {
    if (value === "auto") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", value);
    button.textContent = "Theme: " + value;
    button.dataset.value = value;
  };
  button.hidden = false;
  show(order.includes(stored()) ? stored() : "auto");
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(button.dataset.value) + 1) % order.length];
    show(next); store(next);
  });
  let closed = [];
  addEventListener("beforeprint", () => { closed = [...document.querySelectorAll("details:not([open])")]; closed.forEach((one) => { one.open = true; }); });
  addEventListener("afterprint", () => { closed.forEach((one) => { one.open = false; }); closed = []; });
})();
