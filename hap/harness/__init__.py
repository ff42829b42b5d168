"""Everything that meets files, data, time and pytest; the core never imports it."""
