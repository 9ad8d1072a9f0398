"""What a record is: read, checked, mixed, rendered as chat messages.

One record asks for one target; both may hold text and pictures. Files of records, of other
people's formats (`formats/`), the pictures they name, and the words around a thought. Refuses to
know tensors, tokenizers and models.
"""
