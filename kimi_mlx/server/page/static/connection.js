// The connection to the server: the model that it serves, its key, and whether it can be reached.

import { errorText, getJson, key } from "./api.js";
import { askKey } from "./dialog.js";
import { byId } from "./dom.js";
import { showBanner, showState } from "./header.js";
import { text } from "./i18n.js";

// The model of the server; the values before the first connection are replaced by connect().
export const model = { name: "Kimi", context: 0, seesImages: false, sampling: {} };

let connecting = null; // a promise, while connect() runs
let isGone = false; // the server could not be reached

// Read the model from the server, with a key if it needs one; resolves with whether that worked.
export function connect() {
  connecting ??= readModelWithKey().finally(() => {
    connecting = null;
  });
  return connecting;
}

async function readModelWithKey() {
  let hasAsked = false;
  for (;;) {
    try {
      await readModel();
      if (hasAsked) {
        showBanner("");
        showState("", "");
      }
      return true;
    } catch (error) {
      if (error.status !== 401) {
        showServerError(error);
        return false;
      }
    }
    showState("key", "");
    hasAsked = true;
    const value = await askKey(Boolean(key.get()));
    if (value === null) {
      showBanner(text("keyNeeded"), true);
      return false;
    }
    key.set(value);
  }
}

async function readModel() {
  const { data } = await getJson("v1/models");
  const [first] = data;
  Object.assign(model, {
    name: first.display_name ?? first.id,
    id: first.id,
    context: first.context_length ?? 0,
    seesImages: Boolean(first.supports_image_in),
  });
  model.sampling = (await getJson("v1/cluster")).sampling;
  byId("model").textContent = model.name;
}

// Show an error of a request.
export function showServerError(error) {
  if (error.status === 0) {
    isGone = true;
    showState("bad", text("stateGone"));
    showBanner(text("serverGone"), true);
  } else showBanner(error.status === -1 ? error.message : errorText(error));
}

// Note that the server has answered; returns whether it could not be reached before.
export function noteAnswer() {
  const isBack = isGone;
  isGone = false;
  if (isBack) showBanner(text("serverBack"));
  return isBack;
}
