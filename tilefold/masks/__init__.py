"""Which query may see which key, and expressions of scores: one small language with three folds.

tables          tables of a rule's data: with entries, with bounds alone, and without either
graph           graphs of nodes, walked without recursion: compared, printed, copied
symbols         integers, truths and real numbers, with the operators of Python
nodes           the nodes of an expression over the score and the indices q, k, b, h
expression      trees of nodes, and interpretations of them
skeleton        a tree without its numbers and tables: what kernel source depends on
rewrite         expressions made from other ones: tables filled, indices shifted
arrays          arrays that rules are given, as tables
coordinates     the coordinates of queries and keys, in 1-D and 2-D
table_bounds    the smallest and largest entries of tables over ranges
derivative      derivatives of real expressions, as expressions
pairs           how expressions depend on the query and the key of a pair
hiding          whether a score may hide pairs
evaluate        the exact fold, which is the definition, and the interval fold
runs            from an expression and block sizes to runs of tiles: skipped, full, partial
infix           the third fold: kernel source for languages with infix operators
rule            the base of all rules, joins and pieces of rules
repeated        rules for several batches in a row
parts           rules for a part of the batch and of the heads
traced          rules of a user's own
data_rules      the rules that carry data: documents, lengths, dense
given           rules whose arrays come with each call, taken apart
position_rules  the rules over positions: full, causal, local, prefix, chunked
parse           rules from strings
picture         rules as drawings

A new kind of node is a class in `nodes`, a method with a default in `expression.Interpretation`,
and a meaning in the interpretations that compute: `evaluate` (two), `infix`, and the CPU's.
"""
