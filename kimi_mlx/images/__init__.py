"""Images and video for Kimi's vision tower: read files, check limits, resize, cut into patches."""
