"""MindIE's own routes: fields, answers."""
