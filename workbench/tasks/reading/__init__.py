"""What files hold, before a kind of task makes items of it: encodings, columns, labels, pictures.

These pages know no kind of task, and no model but its config; whatever they treat specially they count, for
notes that stand where the user looks.
"""
