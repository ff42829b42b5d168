"""A stranger's function in the place of HAP's: its runs beside ours, and what can be concluded."""
