"""New channels that leave the function as it is: what each op asks of them, and their values."""
