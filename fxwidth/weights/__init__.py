"""Parameters as matrices that write and read channel groups, and their spectra."""
