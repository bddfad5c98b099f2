"""The tests of llm_inference; README.md here is the map."""
