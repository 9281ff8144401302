// Settings of a conversation: {system, temperature, max_tokens, top_k, top_p, seed, thinking, tools}; a number that is
// missing is the model's own. The last ones are those of the next conversation.

import { remember, remembered } from "./preferences.js";

const NUMBERS = ["temperature", "max_tokens", "top_k", "top_p", "seed"];
export const OF_DIALOG = ["system", ...NUMBERS];

/** Those that a new conversation begins with. */
export function lastSettings() {
  try {
    return cleaned(JSON.parse(remembered("settings")));
  } catch {
    return cleaned({});
  }
}

/** Has the next conversations begin with these of the settings. */
export function rememberSettings(settings, names) {
  const last = lastSettings();
  for (const name of names) last[name] = settings[name]; // undefined is not written
  remember("settings", JSON.stringify(last));
}

/** Settings with exactly our fields, each of its type, from something that may be anything. */
export function cleaned(found) {
  const { system, thinking, tools } = found ?? {};
  const settings = { system: typeof system === "string" ? system : "", thinking: thinking === true, tools: tools !== false };
  for (const name of NUMBERS) if (Number.isFinite(found?.[name])) settings[name] = found[name];
  return settings;
}

/** Lets the user change settings in the dialog; resolves to the new ones, or null if he does not want to. */
export function changed(settings) {
  const dialog = document.querySelector("#settings");
  const fields = dialog.querySelector("form").elements;
  fields.system.value = settings.system;
  for (const name of NUMBERS) fields[name].value = settings[name] ?? "";
  dialog.querySelector("#forget").onclick = () => NUMBERS.forEach((name) => (fields[name].value = ""));
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      if (dialog.returnValue !== "ok") return resolve(null);
      const numbers = NUMBERS.map((name) => [name, fields[name].value === "" ? null : fields[name].valueAsNumber]);
      resolve(cleaned({ ...settings, ...Object.fromEntries(numbers), system: fields.system.value }));
    };
  });
}
