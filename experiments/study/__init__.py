"""What several studies share: texts, tables and curves, and a small DeepSeek-V3."""
