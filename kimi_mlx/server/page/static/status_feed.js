// The status of the server as it changes, for the header and the view of the cluster. It is read while the page is visible;
// after an error the page connects again.

import { pause, readEvents, request, ServerError } from "./api.js";

const RETRY_SECONDS = 3; // if the server does not say when
const SILENCE_MS = 20_000; // the server sends a status every 5 s

export class StatusFeed {
  // `onStatus` is called with each status, `onError` with each error; `askKey` resolves with whether the server accepts a
  // new key.
  constructor({ onStatus, onError, askKey }) {
    Object.assign(this, { onStatus, onError, askKey });
    this.controller = null;
    document.addEventListener("visibilitychange", () => this.start());
  }

  // Read the status as long as the page is visible.
  start() {
    const isVisible = document.visibilityState === "visible";
    if (isVisible && !this.controller) this.follow();
    if (!isVisible) {
      this.controller?.abort();
      this.controller = null;
    }
  }

  async follow() {
    const controller = (this.controller = new AbortController());
    while (!controller.signal.aborted) {
      let seconds = RETRY_SECONDS;
      try {
        await this.read(controller.signal);
      } catch (error) {
        if (error.name === "AbortError") return;
        this.onError(error);
        if (error.status === 401 && !(await this.askKey())) break;
        seconds = error.retryAfter ?? RETRY_SECONDS;
      }
      await pause(1000 * seconds);
    }
    if (this.controller === controller) this.controller = null;
  }

  async read(signal) {
    const silence = new AbortController();
    let timer = null;
    const restartTimer = () => {
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(new ServerError(0, "")), SILENCE_MS);
    };
    const stop = () => silence.abort(signal.reason);
    signal.addEventListener("abort", stop);
    restartTimer();
    try {
      const response = await request("v1/cluster/events", { signal: silence.signal });
      for await (const { event, data } of readEvents(response)) {
        restartTimer();
        if (event === "status") this.onStatus(JSON.parse(data));
      }
    } catch (error) {
      throw silence.signal.aborted ? silence.signal.reason : error;
    } finally {
      clearTimeout(timer);
      signal.removeEventListener("abort", stop);
    }
  }
}
