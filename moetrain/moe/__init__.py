"""The MoE layer and its replaceable parts: routers, capacity, experts, losses."""
