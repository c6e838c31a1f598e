"""What a VCM offers to its consumer: ``components`` serve it over the network, ``middleware`` calls it."""
