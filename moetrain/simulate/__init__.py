"""What-if: balance, traffic, step time and memory of a model on a described cluster. Formulas and replayed routing, no
process groups; whatever comes out is simulated, not measured."""
