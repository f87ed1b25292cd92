"""The frozen int8 transformer: how it is quantised, held, walked and fitted into memory."""
