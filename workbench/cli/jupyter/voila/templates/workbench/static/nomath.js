// Stands in for MathJax, which Voila would fetch from another site: formulas stay as they are written.
window.MathJax = (() => {
  const nothing = () => {};
  return { Hub: { Config: nothing, Configured: nothing, Queue: nothing, Register: { StartupHook: nothing } } };
})();
