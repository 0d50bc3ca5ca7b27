"""DeepSeek-V3's modules in ttnn's vocabulary: namespaces of class methods, never instantiated."""
