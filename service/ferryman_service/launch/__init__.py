"""Starting workers as programs of their own, and telling whether they live."""
