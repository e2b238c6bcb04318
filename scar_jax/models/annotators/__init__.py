"""Frozen networks that draw control maps out of pictures."""
