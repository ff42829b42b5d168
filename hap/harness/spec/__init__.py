"""What a file reproductions/*.toml says: cases, claims, seeds, and the functions that it names."""
