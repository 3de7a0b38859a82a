def write_decoder_card(folder): pass
