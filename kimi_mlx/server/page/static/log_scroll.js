// Scrolling of the conversation: it follows new text until the user scrolls up.

import { byId } from "./dom.js";

const AT_END_PIXELS = 60;

export class LogScroll {
  constructor(log) {
    this.log = log;
    this.isFollowing = true;
    log.addEventListener("scroll", () => this.onScroll(), { passive: true });
    byId("to-end").addEventListener("click", () => {
      this.toEnd();
      byId("input").focus();
    });
    this.sizes = new ResizeObserver(() => this.follow());
  }

  // Show other nodes at their end; with `keepsPlace` only if the end was shown before, else at the same place.
  show(nodes, keepsPlace) {
    const { scrollTop } = this.log;
    this.isFollowing = !keepsPlace || this.isAtEnd();
    this.log.replaceChildren(...nodes);
    this.sizes.disconnect();
    for (const node of [this.log, ...nodes]) this.sizes.observe(node);
    if (this.isFollowing) this.toEnd();
    else this.log.scrollTop = scrollTop;
  }

  // Scroll to new text, unless the user has scrolled up.
  follow() {
    if (this.isFollowing) this.toEnd();
    else byId("to-end").hidden = this.isAtEnd();
  }

  stopFollowing() {
    this.isFollowing = false;
  }

  toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
    this.lastTop = this.log.scrollTop;
    this.isFollowing = true;
    byId("to-end").hidden = true;
  }

  isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < AT_END_PIXELS;
  }

  onScroll() {
    const { scrollTop } = this.log;
    if (this.isAtEnd()) this.isFollowing = true;
    else if (scrollTop < this.lastTop) this.isFollowing = false; // growing text does not move it up
    this.lastTop = scrollTop;
    byId("to-end").hidden = this.isFollowing;
  }
}
