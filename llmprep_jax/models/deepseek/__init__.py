"""DeepSeek-V2, V2-Lite, V3, V3.1 and R1."""
