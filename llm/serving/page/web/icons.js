// Pictures on buttons: lines in the text's colour on a ground of 24 by 24.

const DOTS = "M6 12h.01M12 12h.01M18 12h.01";
const PATHS = {
  new: "M12 5v14M5 12h14",
  conversations: "M4 7h16M4 12h16M4 17h16",
  close: "M6 6l12 12M18 6L6 18",
  settings: "M4 8h8M18 8h2M12 8a3 3 0 1 0 6 0a3 3 0 1 0-6 0M4 16h2M12 16h8M6 16a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
  search: "M4.5 10.5a6 6 0 1 0 12 0a6 6 0 1 0-12 0M15 15l5 5",
  import: "M12 4v11M7 10l5 5 5-5M5 20h14",
  more: DOTS,
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  copied: "M5 13l4 4L19 7",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  retry: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4.5h-4.5",
  raw: "M9 7l-5 5 5 5M15 7l5 5-5 5",
  rendered: "M5 6h14M5 10h14M5 14h14M5 18h8",
  probabilities: "M6 19v-5M12 19V10M18 19V5",
  older: "M14 6l-6 6 6 6",
  newer: "M10 6l6 6-6 6",
  send: "M12 19V6M6 12l6-6 6 6",
  stop: "M8 8h8v8H8z",
  down: "M12 5v13M6 12l6 6 6-6",
};

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "0 0 24 24");
  picture.setAttribute("aria-hidden", "true");
  picture.setAttribute("class", `picture of-${name}`);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  picture.append(path);
  return picture;
}
