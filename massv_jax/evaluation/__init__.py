"""Measuring drafters: acceptance, distributions, and the certificate that nothing changes."""
