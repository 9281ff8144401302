// Pictures that go with a question: chosen, dropped or pasted, made small in the browser, and shown.
//
// A picture: {url, name}, where the url is a data URL; it is sent, kept and exported as it is.

import { announce, iconButton, make, tell } from "./elements.js";
import { label, say } from "./words.js";

const MOST = 8; // of one message
const LONGEST_SIDE = 1024; // pixels; models look at a fraction of that
const SMALL = 500_000; // bytes of a file that is sent as it is
const LONGEST_URL = 4_000_000; // characters; a picture of our side without any compression has fewer
const KINDS = /^data:image\/(png|jpeg|webp|gif|bmp);base64,[A-Za-z0-9+/]+={0,2}$/;

/** Of the pictures in a file, which may come from anybody, those that this page could have made. */
export function cleanedPictures(found) {
  const isOurs = (url) => typeof url === "string" && url.length < LONGEST_URL && KINDS.test(url);
  const pictures = Array.isArray(found) ? found.filter((picture) => isOurs(picture?.url)) : [];
  return pictures.slice(0, MOST).map(({ url, name }) => ({ url, name: String(name ?? "").slice(0, 100) }));
}

/** Pictures in a row; with `removed(picture)` each has a button. */
export function pictureRow(pictures, removed) {
  const shown = pictures.map(({ url, name }, index) => {
    const alt = say("pictureOf", { number: index + 1, name });
    const figure = make("span", { className: "picture" }, make("img", { src: url, alt, title: name }));
    if (removed) {
      const button = iconButton("✕", "removePicture", () => removed(pictures[index]));
      label(button, say("removePicture", { number: index + 1, name }));
      figure.append(button);
    }
    return figure;
  });
  return make("div", { className: "pictures", hidden: !pictures.length }, ...shown);
}

/** The pictures of the question that is being written. */
export class Attached {
  #pictures = [];
  #row = document.querySelector("#attached");
  #allowed;

  /** Settled when all that was given is attached; one file after another, for there is a limit. */
  ready = Promise.resolve();

  /** allowed(): whether the model sees. */
  constructor(allowed) {
    this.#allowed = allowed;
    const [button, files] = [document.querySelector("#picture"), document.querySelector("#pictures")];
    button.onclick = () => files.click();
    files.onchange = () => {
      this.add(files.files);
      files.value = ""; // so that the same file can be chosen again
    };
    const field = document.querySelector("#text");
    field.addEventListener("paste", (event) => this.#receive(event, event.clipboardData));
    const main = document.querySelector("main");
    main.addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
    main.addEventListener("drop", (event) => this.#receive(event, event.dataTransfer));
  }

  /** The pictures, which are attached no more. */
  take() {
    const taken = this.#pictures;
    this.#set([]);
    return taken;
  }

  /** Attaches pictures that were taken. */
  give(pictures) {
    this.#set(pictures);
  }

  get isEmpty() {
    return !this.#pictures.length;
  }

  add(files) {
    const chosen = [...files]; // the list of a field is emptied with it
    this.ready = this.ready.then(() => this.#add(chosen));
  }

  async #add(files) {
    for (const file of files) {
      if (this.#pictures.length === MOST) return tell(say("mostPictures", { most: MOST }));
      try {
        const picture = { url: await small(file), name: file.name };
        this.#set([...this.#pictures, picture]);
        announce(say("pictureAdded", picture));
      } catch {
        tell(say("badPicture", { name: file.name })); // the browser cannot decode it
      }
    }
  }

  #receive(event, data) {
    const isText = event.type === "paste" && data.types.includes("text/plain"); // of a table, with its picture
    if (!data.files.length || isText) return;
    event.preventDefault();
    if (this.#allowed()) this.add(data.files);
    else tell(say("blind"));
  }

  #set(pictures) {
    this.#pictures = pictures;
    const removed = (picture) => {
      this.#set(this.#pictures.filter((other) => other !== picture));
      document.querySelector("#text").focus();
    };
    this.#row.replaceChildren(pictureRow(pictures, removed));
  }
}

/** A data URL of a picture file: the file as it is where it is small, else scaled down. */
async function small(file) {
  const bitmap = await createImageBitmap(file); // upright, as EXIF says
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= SMALL) {
    const url = await asUrl(file);
    if (KINDS.test(url)) return url;
  }
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d");
  Object.assign(context, { fillStyle: "white", imageSmoothingQuality: "high" }); // JPEG knows nothing transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", 0.92);
}

function asUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
