"""Human and AI feedback: labelling, agreement, reliability, active selection and export for reward-model training."""
