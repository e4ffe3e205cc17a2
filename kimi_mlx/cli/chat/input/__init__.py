"""Line editor of the conversation: keys, pasted blocks, history, completion and layout."""
