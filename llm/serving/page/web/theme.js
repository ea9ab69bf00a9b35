// The colours of the first paint, which comes before modules are run; frame.js has them from there on.

{
  const page = document.documentElement;
  let looks = null;
  try {
    looks = JSON.parse(localStorage.getItem(`chat-looks${page.dataset.root}`));
  } catch {
    // Nothing may be kept here, or nothing was.
  }
  const night = window.matchMedia("(prefers-color-scheme: dark)");
  page.dataset.theme = looks?.theme || (night.matches ? "dark" : "light");
}
