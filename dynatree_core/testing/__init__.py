"""The conformance kit: what authors of policies and drafters need to show that theirs are right."""
