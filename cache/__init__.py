"""KV pages and who owns them: page pool, prefix trie, and the manager that joins the two."""
