"""Drafts: tokens proposed to follow a sequence, which the model verifies several at a time."""
