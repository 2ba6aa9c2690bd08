"""What runs when: the parts between the engine, the learners and the policy."""
