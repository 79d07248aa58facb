"""What commands do before their imports, which take seconds: help, huge pages, compile cache."""
