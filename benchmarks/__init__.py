"""Side by side with transformers, accelerate and llama.cpp, in one run; results are kept in docs/benchmarks.md."""
