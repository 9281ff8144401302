// Light or dark colours.

import { remember, remembered } from "./preferences.js";
import { label, say } from "./words.js";

const THEMES = ["auto", "light", "dark"];
const now = () => (THEMES.includes(remembered("theme")) ? remembered("theme") : "auto");

export function showTheme() {
  document.documentElement.dataset.theme = now();
  label(document.querySelector("#theme"), say("theme", { now: say(now()) }));
}

export function switchTheme() {
  remember("theme", THEMES[(THEMES.indexOf(now()) + 1) % THEMES.length]);
  showTheme();
}
