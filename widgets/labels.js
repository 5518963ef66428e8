// Names for screen readers: ipywidgets gives slider handles no name and rounds what they say to one decimal.
const put = (element, name, value) => {
  if (element && value && element.getAttribute(name) !== value) element.setAttribute(name, value);
};

const nameSliders = (panel) => {
  for (const slider of panel.querySelectorAll(".widget-slider")) {
    const handle = slider.querySelector(".noUi-handle");
    const value = slider.querySelector(".widget-readout")?.textContent.trim();
    put(handle, "aria-label", slider.querySelector(".widget-label")?.textContent.trim());
    put(handle, "aria-valuetext", value);
    put(handle, "aria-valuenow", value);
  }
};

const attached = async (el) => {
  while (!el.isConnected) await new Promise(requestAnimationFrame);
  return el.closest(".wb-panel");
};

export default {
  render({ model, el }) {
    const ended = new AbortController();
    attached(el).then((panel) => {
      if (!panel || ended.signal.aborted) return;
      // JupyterLab takes arrows and letters for cells unless the focused element itself says no; Ctrl+S and the like stay JupyterLab's
      window.addEventListener("keydown", (event) => {
        if (!panel.contains(event.target)) return;
        if (event.ctrlKey || event.metaKey || event.altKey) event.target.removeAttribute("data-lm-suppress-shortcuts");
        else put(event.target, "data-lm-suppress-shortcuts", "true");
      }, { capture: true, signal: ended.signal });
      for (const [place, words] of Object.entries(model.get("groups"))) {
        for (const group of panel.querySelectorAll(place)) { put(group, "role", "group"); put(group, "aria-label", words); }
      }
      const left = panel.querySelector(".wb-left") ?? panel;  // not the plot, which changes all the time
      const observer = new MutationObserver(() => nameSliders(panel));
      observer.observe(left, { subtree: true, childList: true, characterData: true, attributeFilter: ["aria-valuenow", "aria-valuetext"] });
      ended.signal.addEventListener("abort", () => observer.disconnect());
      nameSliders(panel);
    });
    return () => ended.abort();
  },
};
