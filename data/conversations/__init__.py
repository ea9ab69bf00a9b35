"""Prompts, answers and preferences: from files of any format to what is learnt of them.

- tasks: which files; record_files: records of a file; instruct_formats, instruct: as examples;
- chat_encoding: as ids by the chat template; instruct_dataset, preference: as samples;
- packing: several in a row, rows in a batch; instruct_store: kept on disk;
- commands: convert_instruct rewrites files, make_task makes small tasks.
"""
